"""Postgres as both of its roles, and two organizations that must never meet."""

from collections.abc import AsyncIterator

import pytest

from ibex.domain.directives import DirectiveMode
from ibex.stores.postgres.directives import DirectiveAdmin
from ibex.stores.postgres.identity_admin import IdentityAdmin
from ibex.stores.postgres.pool import Postgres
from ibex.stores.postgres.sessions import SessionStore
from tests.conftest import PostgresDatabase
from tests.tenants import Tenant, make_tenant


@pytest.fixture
async def app(postgres_database: PostgresDatabase) -> AsyncIterator[Postgres]:
    """A pool in the application's role."""
    postgres = await Postgres.connect(postgres_database.dsn, name="test app")
    yield postgres
    await postgres.close()


@pytest.fixture
async def owner(postgres_database: PostgresDatabase) -> AsyncIterator[Postgres]:
    """A pool in the owner's role."""
    postgres = await Postgres.connect(postgres_database.admin_dsn, name="test owner")
    yield postgres
    await postgres.close()


@pytest.fixture
def admin(owner: Postgres) -> IdentityAdmin:
    """What operators change identity with."""
    return IdentityAdmin(owner, actor="tester")


@pytest.fixture
def directives(owner: Postgres) -> DirectiveAdmin:
    """What operators change directives with."""
    return DirectiveAdmin(owner, actor="tester")


@pytest.fixture
async def tenant(admin: IdentityAdmin) -> Tenant:
    """One organization."""
    return await make_tenant(admin, "acme")


@pytest.fixture
async def tenants(admin: IdentityAdmin, directives: DirectiveAdmin, app: Postgres) -> tuple[Tenant, Tenant]:
    """Two organizations, each with rows in every table that belongs to an organization."""
    made = []
    for name in ("acme", "bolt"):
        one = await make_tenant(admin, name)
        await admin.set_limit(one.org_id, 600)
        await directives.set(one.agent_id, f"You work for {name}.", DirectiveMode.SYSTEM_FIRST)
        await SessionStore(app).record([one.make_turn()])
        made.append(one)
    return made[0], made[1]
