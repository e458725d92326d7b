"""What the proxy reads of a credential."""

from datetime import timedelta
from uuid import uuid4

import pytest

from ibex.domain.identity import PROXY_CHAT, AgentId, TokenId, digest_bearer
from ibex.errors import StoreUnavailable
from ibex.stores.postgres.identity import IdentityReader
from ibex.stores.postgres.identity_admin import IdentityAdmin
from ibex.stores.postgres.pool import Postgres
from tests.conftest import PostgresDatabase
from tests.relays import relayed
from tests.tenants import Tenant


@pytest.fixture
def reader(app: Postgres) -> IdentityReader:
    """The reader in the application's role."""
    return IdentityReader(app)


async def test_a_credential_is_all_that_decides(tenant: Tenant, reader: IdentityReader, admin: IdentityAdmin) -> None:
    await admin.set_limit(tenant.org_id, 600)
    await admin.set_limit(tenant.org_id, 30, tenant.agent_id)
    found = await reader.find_credential(tenant.token_id, tenant.agent_id)
    assert found is not None
    assert (found.org_id, found.user_id, found.agent_id) == (tenant.org_id, tenant.user_id, tenant.agent_id)
    assert (found.digest, found.permissions) == (digest_bearer(tenant.bearer), PROXY_CHAT)
    assert (found.is_revoked, found.expires_in, found.bound_agent_id) == (False, None, None)
    assert (found.org_status, found.user_status, found.agent_status) == ("active", "active", "active")
    assert (found.org_rpm, found.agent_rpm) == (600, 30)


async def test_every_status_is_read(tenant: Tenant, reader: IdentityReader, admin: IdentityAdmin) -> None:
    await admin.set_status("organization", tenant.org_id, "suspended")
    await admin.set_status("user", tenant.user_id, "suspended")
    await admin.set_status("agent", tenant.agent_id, "archived")
    await admin.revoke_token(tenant.token_id)
    found = await reader.find_credential(tenant.token_id, tenant.agent_id)
    assert found is not None
    assert (found.org_status, found.user_status, found.agent_status) == ("suspended", "suspended", "archived")
    assert found.is_revoked


async def test_an_unknown_token_is_none(tenant: Tenant, reader: IdentityReader) -> None:
    assert await reader.find_credential(TokenId(uuid4()), tenant.agent_id) is None


async def test_an_agent_elsewhere_or_nowhere_has_no_status(
    tenants: tuple[Tenant, Tenant], reader: IdentityReader, admin: IdentityAdmin
) -> None:
    ours, theirs = tenants
    await admin.set_limit(theirs.org_id, 30, theirs.agent_id)
    for agent_id in (theirs.agent_id, AgentId(uuid4())):
        found = await reader.find_credential(ours.token_id, agent_id)
        assert found is not None
        assert (found.org_id, found.agent_id) == (ours.org_id, agent_id)
        assert (found.agent_status, found.agent_rpm, found.org_rpm) == (None, None, 600)


async def test_a_token_may_be_bound_and_expire(tenant: Tenant, reader: IdentityReader, admin: IdentityAdmin) -> None:
    row, _ = await admin.mint_token(tenant.org_id, agent=tenant.agent_id, expires_in=timedelta(hours=1))
    found = await reader.find_credential(row["token_id"], tenant.agent_id)
    assert found is not None
    assert found.bound_agent_id == tenant.agent_id
    assert found.expires_in is not None
    assert 3000 < found.expires_in <= 3600


async def test_expiry_counts_below_zero(
    tenant: Tenant, reader: IdentityReader, admin: IdentityAdmin, owner: Postgres
) -> None:
    async with owner.transaction() as connection:
        await connection.execute("update ibex_core.tokens set expires_at = now() - interval '1 minute'")
    found = await reader.find_credential(tenant.token_id, tenant.agent_id)
    assert found is not None
    assert found.expires_in is not None
    assert found.expires_in < -50


async def test_many_are_read_at_once_and_what_is_gone_is_absent(
    tenants: tuple[Tenant, Tenant], reader: IdentityReader, owner: Postgres
) -> None:
    ours, theirs = tenants
    async with owner.transaction() as connection:
        await connection.execute("delete from ibex_core.tokens where token_id = $1", theirs.token_id)
    keys = [
        (ours.org_id, ours.token_id, ours.agent_id),
        (ours.org_id, ours.token_id, theirs.agent_id),
        (theirs.org_id, theirs.token_id, theirs.agent_id),
        (theirs.org_id, ours.token_id, theirs.agent_id),
    ]
    found = await reader.find_credentials(keys)
    assert set(found) == {(ours.token_id, ours.agent_id), (ours.token_id, theirs.agent_id)}
    assert found[ours.token_id, ours.agent_id] == await reader.find_credential(ours.token_id, ours.agent_id)
    assert found[ours.token_id, theirs.agent_id].agent_status is None
    assert await reader.find_credentials([]) == {}


async def test_use_is_noted_to_the_minute_within_the_organization(
    tenants: tuple[Tenant, Tenant], reader: IdentityReader, owner: Postgres
) -> None:
    ours, theirs = tenants
    await reader.mark_used([(ours.org_id, ours.token_id), (ours.org_id, theirs.token_id)])
    await reader.mark_used([])
    async with owner.transaction() as connection:
        rows = await connection.fetch(
            "select token_id, last_used_at from ibex_core.tokens where last_used_at is not null"
        )
        assert [row["token_id"] for row in rows] == [ours.token_id]
        await reader.mark_used([(ours.org_id, ours.token_id)])
        assert await connection.fetchval("select max(last_used_at) from ibex_core.tokens") == rows[0]["last_used_at"]


async def test_a_store_that_is_away_is_not_an_unknown_token(
    tenant: Tenant, postgres_database: PostgresDatabase
) -> None:
    async with relayed(postgres_database.dsn) as relay:
        app = await Postgres.connect(relay.dsn, name="test")
        await relay.stop()
        with pytest.raises(StoreUnavailable):
            await IdentityReader(app).find_credential(tenant.token_id, tenant.agent_id)
        await app.close()
