"""Migrations on a database that holds data lose no row they do not own; today's ibex serves on tomorrow's schema."""

import asyncio
import json
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import asyncpg
import pytest

from ibex.domain.directives import DirectiveMode
from ibex.domain.identity import DEV_ORG_ID, AgentId
from ibex.errors import SchemaMismatch
from ibex.runtime import clickhouse_migrator
from ibex.stores.clickhouse.traces import TraceStore
from ibex.stores.migrations import Migration, Migrator, find_migrations
from ibex.stores.postgres.directives import DirectiveAdmin
from ibex.stores.postgres.identity_admin import IdentityAdmin
from ibex.stores.postgres.identity_directory import IdentityDirectory
from ibex.stores.postgres.pool import Postgres
from ibex.stores.postgres.schema import PostgresTarget, check_schema, postgres_migrator, seed_development
from ibex.stores.postgres.sessions import SessionStore
from tests.acceptance.conftest import House, start_house, stop_house
from tests.conftest import PostgresDatabase, run_clickhouse
from tests.stores.schema_texts import describe_postgres, path_of
from tests.tenants import Tenant
from tests.turns import make_turn

KNOWN = find_migrations("postgres")

EXPANDING = Migration(
    len(KNOWN) + 1,
    "expanding",
    """
    alter table ibex_core.checkpoints add column cost_usd numeric, add column price_version integer default 1;
    alter table ibex_core.sessions add column title text;
    alter table ibex_core.tokens add column note text;
    alter table ibex_core.organizations add column region text not null default 'anywhere';
    alter table ibex_core.directive_versions add column author text;
    create index on ibex_core.checkpoints (model);
    create table ibex_core.prices (model text primary key, usd numeric not null);
    """,
    "select 1",
)
"""What a next version may do while this one serves: add, and require nothing."""

CONTRACTING = Migration(len(KNOWN) + 2, "contracting", "drop table ibex_core.prices", "select 1")


async def rows_of(dsn: str) -> dict[str, list[str]]:
    """Every row of every table, as text."""
    connection = await asyncpg.connect(dsn)
    try:
        names = await connection.fetch("select tablename from pg_tables where schemaname = 'ibex_core'")
        return {
            name: [
                row[0] for row in await connection.fetch(f"select t::text from ibex_core.{name} as t order by t::text")
            ]
            for (name,) in names
            if name != "schema_migrations"
        }
    finally:
        await connection.close()


async def test_no_step_back_and_forth_loses_a_row_it_does_not_own(
    postgres_database: PostgresDatabase, tenants: tuple[Tenant, Tenant]
) -> None:
    dsn = postgres_database.admin_dsn
    rows = await rows_of(dsn)
    assert all(rows.values()), "every table must hold something"
    async with postgres_migrator(dsn) as migrator:
        for migration, before in zip(reversed(KNOWN), reversed([None, *KNOWN[:-1]]), strict=True):
            rows = await rows_of(dsn)
            assert await migrator.down() == migration
            if before is not None:
                assert await describe_postgres(dsn) == path_of("postgres", before).read_text()
            left = await rows_of(dsn)
            assert left == {name: rows[name] for name in left}, migration.label
            assert await migrator.up() == KNOWN[KNOWN.index(migration) :]
            again = await rows_of(dsn)
            assert {name: again[name] for name in left} == left, migration.label
            while (await migrator.down()) != migration:
                pass


async def test_an_erasure_under_way_is_a_suspension_one_step_back(
    postgres_database: PostgresDatabase, tenants: tuple[Tenant, Tenant]
) -> None:
    connection = await asyncpg.connect(postgres_database.admin_dsn)
    statuses = "select status from ibex_core.organizations order by created_at"
    await connection.execute(
        "update ibex_core.organizations set status = 'erasing' where org_id = $1", tenants[0].org_id
    )
    async with postgres_migrator(postgres_database.admin_dsn) as migrator:
        while (await migrator.down()) != KNOWN[4]:
            pass
        assert [row["status"] for row in await connection.fetch(statuses)] == ["suspended", "active"]
        await migrator.up()
    assert [row["status"] for row in await connection.fetch(statuses)] == ["suspended", "active"]
    await connection.close()


async def test_no_step_loses_a_trace(clickhouse_dsn: str) -> None:
    async with clickhouse_migrator(clickhouse_dsn) as migrator:
        known = await migrator.up()
        traces = TraceStore(clickhouse_dsn)
        await traces.insert([make_turn() for _ in range(50)], "token")
        for _ in known[1:]:
            await migrator.down()
            assert run_clickhouse(clickhouse_dsn, "select count() from llm_traces").strip() == "50"
        assert await migrator.up() == known[1:]
        assert run_clickhouse(clickhouse_dsn, "select count() from llm_traces").strip() == "50"
        await traces.close()


@dataclass
class Server:
    """`ibexctl serve` of today on stores of the test's own."""

    house: House
    owner: "asyncpg.Connection[asyncpg.Record]"
    clickhouse_dsn: str

    def ask(self, session: str) -> str:
        """Have a chat; its turn's id."""
        body = json.dumps({"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello!"}]}).encode()
        headers = {**self.house.headers, "Content-Type": "application/json", "X-IBEX-Session-ID": session}
        request = urllib.request.Request(f"{self.house.url}/v1/chat/completions", body, headers)
        with urllib.request.urlopen(request, timeout=20) as reply:
            return str(reply.headers["X-IBEX-Turn-ID"])

    async def recorded(self) -> list[str]:
        """The turns in Postgres, in the order of their indexes."""
        rows = await self.owner.fetch("select turn_id::text from ibex_core.checkpoints order by turn_index")
        return [row["turn_id"] for row in rows]

    async def traced(self) -> int:
        """How many turns are in ClickHouse."""
        return int(await asyncio.to_thread(run_clickhouse, self.clickhouse_dsn, "select count() from llm_traces"))


@pytest.fixture
async def server(
    postgres_database: PostgresDatabase, redis_url: str, clickhouse_dsn: str, data_dir: Path
) -> AsyncIterator[Server]:
    await seed_development(postgres_database.admin_dsn)
    async with clickhouse_migrator(clickhouse_dsn) as migrator:
        await migrator.up()
    stores = {
        "IBEX_POSTGRES_DSN": postgres_database.dsn,
        "IBEX_POSTGRES_ADMIN_DSN": postgres_database.admin_dsn,
        "IBEX_REDIS_URL": redis_url,
        "IBEX_CLICKHOUSE_DSN": clickhouse_dsn,
        "IBEX_WORKERS": "1",
    }
    async with _owner(postgres_database) as owner:
        house = await asyncio.to_thread(start_house, data_dir, **stores)
        try:
            yield Server(house, owner, clickhouse_dsn)
        finally:
            assert await asyncio.to_thread(stop_house, house) == 0


@asynccontextmanager
async def _owner(database: PostgresDatabase) -> "AsyncIterator[asyncpg.Connection[asyncpg.Record]]":
    connection = await asyncpg.connect(database.admin_dsn)
    yield connection
    await connection.close()


async def migrate_to(owner: "asyncpg.Connection[asyncpg.Record]", *more: Migration) -> None:
    """Apply what comes after today's migrations."""
    assert await Migrator(PostgresTarget(owner, lock_timeout=10), [*KNOWN, *more]).up()


async def test_todays_server_and_operators_go_on_while_the_schema_is_expanded_under_them(
    server: Server, owner: Postgres
) -> None:
    agent_id = AgentId(UUID(server.house.headers["X-IBEX-Agent-ID"]))
    operators = IdentityDirectory(owner), IdentityAdmin(owner), DirectiveAdmin(owner), SessionStore(owner)
    directory, identity, directives, sessions = operators
    await directory.list_tokens()
    turns = [await asyncio.to_thread(server.ask, "upgrade")]
    await migrate_to(server.owner, EXPANDING)
    run_clickhouse(server.clickhouse_dsn, "alter table llm_traces add column cost_usd Nullable(Float64)")
    turns += [await asyncio.to_thread(server.ask, "upgrade") for _ in range(5)]
    await identity.mint_token(DEV_ORG_ID)
    await directives.set(agent_id, "Be brief.", DirectiveMode.SYSTEM_FIRST)
    turns.append(await asyncio.to_thread(server.ask, "upgrade"))
    deadline = time.monotonic() + 20
    while (found := (await server.recorded(), await server.traced())) != (turns, len(turns)):
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.05)
    assert len(await directory.list_tokens()) == 2
    assert len((await sessions.show("upgrade", agent_id))["checkpoints"]) == len(turns)


async def test_a_schema_two_steps_ahead_is_refused_with_what_to_do(postgres_database: PostgresDatabase) -> None:
    async with _owner(postgres_database) as owner:
        await migrate_to(owner, EXPANDING)
        await check_schema(postgres_database.dsn)
        await migrate_to(owner, EXPANDING, CONTRACTING)
    with pytest.raises(SchemaMismatch, match=f"is at {CONTRACTING.number:04}.*serves at most one more") as caught:
        await check_schema(postgres_database.dsn)
    assert "Install the version of ibex this database belongs to" in (caught.value.hint or "")
