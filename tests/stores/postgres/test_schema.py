"""The schema's own promises: row security on every tenant table, least grants, triggers on what decides."""

import asyncpg
import pytest

from ibex.domain.directives import DirectiveMode
from ibex.domain.identity import DEV_AGENT_ID, DEV_ORG_ID, DEV_TOKEN, DEV_TOKEN_ID, digest_bearer
from ibex.errors import StoreRefused
from ibex.stores.postgres.directives import DirectiveAdmin
from ibex.stores.postgres.identity import IdentityReader
from ibex.stores.postgres.identity_admin import IdentityAdmin
from ibex.stores.postgres.pool import Postgres
from ibex.stores.postgres.schema import seed_development
from tests.conftest import PostgresDatabase
from tests.tenants import Tenant

TENANT_TABLES = (
    *("organizations", "users", "agents", "tokens", "limits"),
    *("directives", "directive_versions", "sessions", "checkpoints", "audit_events"),
)


async def test_every_table_with_an_organization_forces_row_security(owner: Postgres) -> None:
    async with owner.transaction() as connection:
        rows = await connection.fetch(
            """
            select c.relname as name, c.relrowsecurity and c.relforcerowsecurity as is_forced,
                c.relowner::regrole::text as owner,
                (select array_agg(p.policyname::text order by p.policyname) from pg_policies as p
                 where p.schemaname = 'ibex_core' and p.tablename = c.relname) as policies
            from pg_class as c join pg_attribute as a on a.attrelid = c.oid and a.attname = 'org_id'
            where c.relnamespace = 'ibex_core'::regnamespace and c.relkind = 'r'
            """
        )
    assert sorted(row["name"] for row in rows) == sorted(TENANT_TABLES)
    for row in rows:
        assert row["is_forced"], row["name"]
        assert row["owner"] == "ibex_owner"
        assert row["policies"] == ["operator", *(["presented"] if row["name"] == "tokens" else []), "tenant"]


async def test_an_organization_sees_only_its_own_rows(tenants: tuple[Tenant, Tenant], app: Postgres) -> None:
    ours, theirs = tenants
    for table in TENANT_TABLES:
        async with app.transaction(org_ids=[ours.org_id]) as connection:
            org_ids = {row["org_id"] for row in await connection.fetch(f"select org_id from ibex_core.{table}")}
        async with app.transaction(org_ids=[ours.org_id, theirs.org_id]) as connection:
            both = await connection.fetchval(f"select count(distinct org_id) from ibex_core.{table}")
        async with app.transaction() as connection:
            unnamed = await connection.fetchval(f"select count(*) from ibex_core.{table}")
        assert (org_ids, both, unnamed) == ({ours.org_id}, 2, 0), table


async def test_a_scope_that_was_never_set_shows_nothing_and_junk_is_an_error(
    tenants: tuple[Tenant, Tenant], postgres_database: PostgresDatabase
) -> None:
    connection = await asyncpg.connect(postgres_database.dsn)
    try:
        for table in TENANT_TABLES:
            assert await connection.fetchval(f"select count(*) from ibex_core.{table}") == 0
        await connection.execute("set ibex.org_ids = 'junk'")
        for table in TENANT_TABLES:
            with pytest.raises(asyncpg.InvalidTextRepresentationError):
                await connection.fetchval(f"select count(*) from ibex_core.{table}")
    finally:
        await connection.close()


async def test_the_application_cannot_write_into_another_organization(
    tenants: tuple[Tenant, Tenant], app: Postgres, owner: Postgres
) -> None:
    ours, theirs = tenants
    with pytest.raises(StoreRefused):
        async with app.transaction(org_ids=[ours.org_id]) as connection:
            await connection.execute(
                "insert into ibex_core.sessions (session_id, org_id, agent_id, external_id, last_turn_at)"
                " values (gen_random_uuid(), $1, $2, 'theirs', now())",
                *(theirs.org_id, theirs.agent_id),
            )
    async with app.transaction(org_ids=[ours.org_id]) as connection:
        changed = await connection.execute("update ibex_core.sessions set turn_count = 99")
        marked = await connection.execute("update ibex_core.tokens set last_used_at = now()")
    assert (changed, marked) == ("UPDATE 1", "UPDATE 1")
    async with owner.transaction() as connection:
        counts = await connection.fetch("select org_id, turn_count from ibex_core.sessions where turn_count = 99")
    assert [row["org_id"] for row in counts] == [ours.org_id]


@pytest.mark.parametrize(
    "statement",
    [
        "insert into ibex_core.changes (kind, entity_id) values ('token', gen_random_uuid())",
        "delete from ibex_core.changes",
        "delete from ibex_core.sessions",
        "delete from ibex_core.checkpoints",
        "insert into ibex_core.organizations (org_id, name) values (gen_random_uuid(), 'mine')",
        "update ibex_core.tokens set revoked_at = null",
        "update ibex_core.tokens set permissions = 0",
        "update ibex_core.agents set status = 'active'",
        "delete from ibex_core.limits",
        "delete from ibex_core.audit_events",
        "truncate ibex_core.sessions",
        "create table ibex_core.mine ()",
        "alter table ibex_core.tokens disable row level security",
        "set role ibex_owner",
    ],
)
async def test_the_application_may_not(statement: str, tenants: tuple[Tenant, Tenant], app: Postgres) -> None:
    with pytest.raises(StoreRefused) as caught:
        async with app.transaction(org_ids=[tenants[0].org_id]) as connection:
            await connection.execute(statement)
    assert isinstance(caught.value.__cause__, asyncpg.InsufficientPrivilegeError)


async def test_an_agent_of_another_organization_cannot_be_referred_to(
    tenants: tuple[Tenant, Tenant], owner: Postgres
) -> None:
    ours, theirs = tenants
    for statement in (
        "update ibex_core.tokens set agent_id = $2 where org_id = $1",
        "update ibex_core.limits set agent_id = $2 where org_id = $1",
        "update ibex_core.sessions set agent_id = $2 where org_id = $1",
    ):
        with pytest.raises(StoreRefused, match="ForeignKeyViolation"):
            async with owner.transaction() as connection:
                await connection.execute(statement, ours.org_id, theirs.agent_id)


async def changes_of(owner: Postgres, statement: str, *values: object) -> list[tuple[str, object]]:
    async with owner.transaction() as connection:
        await connection.execute(statement, *values)
        rows = await connection.fetch("select kind, entity_id from ibex_core.changes where xid = pg_current_xact_id()")
    return [(row["kind"], row["entity_id"]) for row in rows]


async def test_every_deciding_column_writes_a_change(tenants: tuple[Tenant, Tenant], owner: Postgres) -> None:
    ours = tenants[0]
    user = (await row_of(owner, "users", ours))["user_id"]
    for statement, key, kind, entity_id in (
        (
            "update ibex_core.organizations set status = 'suspended' where org_id = $1",
            ours.org_id,
            "organization",
            ours.org_id,
        ),
        ("update ibex_core.users set status = 'suspended' where user_id = $1", user, "user", user),
        ("update ibex_core.agents set status = 'paused' where agent_id = $1", ours.agent_id, "agent", ours.agent_id),
        ("update ibex_core.tokens set revoked_at = now() where token_id = $1", ours.token_id, "token", ours.token_id),
        ("update ibex_core.tokens set expires_at = now() where token_id = $1", ours.token_id, "token", ours.token_id),
        ("update ibex_core.tokens set permissions = 0 where token_id = $1", ours.token_id, "token", ours.token_id),
        ("update ibex_core.tokens set agent_id = null where token_id = $1", ours.token_id, "token", ours.token_id),
        ("update ibex_core.tokens set digest = digest where token_id = $1", ours.token_id, "token", ours.token_id),
        ("update ibex_core.tokens set user_id = user_id where token_id = $1", ours.token_id, "token", ours.token_id),
        ("update ibex_core.limits set rpm = 5 where org_id = $1", ours.org_id, "limit", ours.org_id),
        ("update ibex_core.directives set version = 1 where agent_id = $1", ours.agent_id, "directive", ours.agent_id),
        ("delete from ibex_core.directives where agent_id = $1", ours.agent_id, "directive", ours.agent_id),
        ("delete from ibex_core.limits where org_id = $1", ours.org_id, "limit", ours.org_id),
        ("delete from ibex_core.tokens where token_id = $1", ours.token_id, "token", ours.token_id),
    ):
        assert await changes_of(owner, statement, key) == [(kind, entity_id)], statement


async def row_of(owner: Postgres, table: str, tenant: Tenant) -> asyncpg.Record:
    async with owner.transaction() as connection:
        row = await connection.fetchrow(f"select * from ibex_core.{table} where org_id = $1", tenant.org_id)
    assert row is not None
    return row


async def test_what_decides_nothing_writes_no_change(tenants: tuple[Tenant, Tenant], owner: Postgres) -> None:
    for statement in (
        "update ibex_core.tokens set last_used_at = now(), name = 'other' where org_id = $1",
        "update ibex_core.organizations set name = 'other' where org_id = $1",
        "update ibex_core.agents set name = 'other' where org_id = $1",
        "update ibex_core.sessions set turn_count = 7 where org_id = $1",
    ):
        assert await changes_of(owner, statement, tenants[0].org_id) == []


async def test_a_limit_that_moves_tells_of_both(tenant: Tenant, admin: IdentityAdmin, owner: Postgres) -> None:
    await admin.set_limit(tenant.org_id, 9)
    changes = await changes_of(
        owner, "update ibex_core.limits set agent_id = $2 where org_id = $1", tenant.org_id, tenant.agent_id
    )
    assert sorted(changes) == sorted([("limit", tenant.org_id), ("limit", tenant.agent_id)])


async def test_deciding_tables_cannot_be_truncated_in_silence(tenant: Tenant, owner: Postgres) -> None:
    for table in ("organizations", "users", "agents", "tokens", "limits", "directives"):
        with pytest.raises(StoreRefused):
            async with owner.transaction() as connection:
                await connection.execute(f"truncate ibex_core.{table} cascade")


async def test_a_directive_version_cannot_be_rewritten(
    tenant: Tenant, directives: DirectiveAdmin, owner: Postgres
) -> None:
    await directives.set(tenant.agent_id, "Be brief.", DirectiveMode.SYSTEM_FIRST)
    with pytest.raises(StoreRefused):
        async with owner.transaction() as connection:
            await connection.execute("update ibex_core.directive_versions set text = 'Be long.'")


async def test_the_development_seed_can_be_sown_twice(
    postgres_database: PostgresDatabase, app: Postgres, admin: IdentityAdmin
) -> None:
    reader = IdentityReader(app)
    assert not await reader.has_development_token()
    await seed_development(postgres_database.admin_dsn)
    await seed_development(postgres_database.admin_dsn)
    assert await reader.has_development_token()
    credential = await reader.find_credential(DEV_TOKEN_ID, DEV_AGENT_ID)
    assert credential is not None
    assert (credential.org_id, credential.agent_status, credential.digest) == (
        DEV_ORG_ID,
        "active",
        digest_bearer(DEV_TOKEN),
    )


async def test_the_seed_does_not_bring_a_revoked_token_back(
    postgres_database: PostgresDatabase, app: Postgres, admin: IdentityAdmin
) -> None:
    await seed_development(postgres_database.admin_dsn)
    await admin.revoke_token(DEV_TOKEN_ID)
    await seed_development(postgres_database.admin_dsn)
    credential = await IdentityReader(app).find_credential(DEV_TOKEN_ID, DEV_AGENT_ID)
    assert credential is not None
    assert credential.is_revoked
