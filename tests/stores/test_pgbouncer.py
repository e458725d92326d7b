"""Behind PgBouncer in transaction mode each transaction may have another connection; nothing is missed or mixed."""

import asyncio
import json
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from ibex.domain.identity import DEV_TOKEN_ID, OrgId
from ibex.errors import StoreRefused
from ibex.runtime import clickhouse_migrator
from ibex.stores.postgres.changes import ChangeFeed
from ibex.stores.postgres.identity import IdentityReader
from ibex.stores.postgres.identity_admin import IdentityAdmin
from ibex.stores.postgres.pool import Postgres
from ibex.stores.postgres.schema import check_schema, seed_development
from ibex.stores.postgres.sessions import SessionStore
from tests.acceptance.conftest import House, start_house, stop_house
from tests.conftest import PostgresDatabase
from tests.pgbouncer import PROGRAM, pooled
from tests.tenants import Tenant

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="pgbouncer is not installed (Debian's package of this name)")


@pytest.fixture
async def dsn(postgres_database: PostgresDatabase) -> AsyncIterator[str]:
    """The application's address through a pooler."""
    with pooled(postgres_database.dsn) as (address,):
        yield address


async def test_many_clients_share_two_connections(
    dsn: str, postgres_database: PostgresDatabase, tenants: tuple[Tenant, Tenant]
) -> None:
    await check_schema(dsn)
    postgres = await Postgres.connect(dsn, name="pooled", max_size=8)
    sessions, reader = SessionStore(postgres), IdentityReader(postgres)

    async def work(tenant: Tenant, number: int) -> set[OrgId]:
        await sessions.record([tenant.make_turn(f"pooled-{number}") for _ in range(3)])
        found = await reader.find_credential(tenant.token_id, tenant.agent_id)
        assert found is not None
        assert found.org_id == tenant.org_id
        async with postgres.transaction(org_ids=[tenant.org_id]) as connection:
            return {row["org_id"] for row in await connection.fetch("select org_id from ibex_core.checkpoints")}

    seen = await asyncio.gather(*(work(tenant, number) for number in range(20) for tenant in tenants))
    assert seen == [{tenant.org_id} for _ in range(20) for tenant in tenants]
    async with postgres.transaction() as connection:
        assert await connection.fetchval("select count(*) from ibex_core.checkpoints") == 0, "no scope is left over"
    await postgres.close()


async def test_the_feed_hears_every_change(dsn: str, tenant: Tenant, admin: IdentityAdmin) -> None:
    feeds = [ChangeFeed(dsn, deadline=5) for _ in range(5)]
    for feed in feeds:
        assert (await feed.poll()).is_reset
    for _ in range(10):
        await admin.set_status("agent", tenant.agent_id, "paused")
        heard = await asyncio.gather(*(feed.poll() for feed in feeds))
        assert [[(row.kind, row.entity_id) for row in changes.rows] for changes in heard] == [
            [("agent", tenant.agent_id)]
        ] * 5
    for feed in feeds:
        await feed.close()


async def test_a_pooler_that_the_dsn_does_not_name_is_said(dsn: str, tenant: Tenant) -> None:
    postgres = await Postgres.connect(dsn.replace("?pgbouncer=true", ""), name="unaware", max_size=8)
    reader = IdentityReader(postgres)

    async def look_up_often() -> None:
        for _ in range(20):
            await asyncio.gather(*(reader.find_credential(tenant.token_id, tenant.agent_id) for _ in range(8)))

    with pytest.raises(StoreRefused, match="pgbouncer=true"):
        await look_up_often()
    await postgres.close()


async def test_a_server_behind_a_pooler_serves_records_and_hears(
    dsn: str, postgres_database: PostgresDatabase, redis_url: str, clickhouse_dsn: str, data_dir: Path
) -> None:
    await seed_development(postgres_database.admin_dsn)
    async with clickhouse_migrator(clickhouse_dsn) as migrator:
        await migrator.up()
    house = await asyncio.to_thread(
        start_house,
        data_dir,
        IBEX_POSTGRES_DSN=dsn,
        IBEX_POSTGRES_ADMIN_DSN=postgres_database.admin_dsn,
        IBEX_REDIS_URL=redis_url,
        IBEX_CLICKHOUSE_DSN=clickhouse_dsn,
    )
    try:
        assert [await asyncio.to_thread(ask, house) for _ in range(20)] == [200] * 20
        owner = await asyncpg.connect(postgres_database.admin_dsn)
        deadline = time.monotonic() + 20
        while await owner.fetchval("select count(*) from ibex_core.checkpoints") < 20:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        # Behind ibexctl's back, so that nobody is told but by the feed.
        await owner.execute("update ibex_core.tokens set revoked_at = now() where token_id = $1", DEV_TOKEN_ID)
        await owner.close()
        deadline = time.monotonic() + 6
        while await asyncio.to_thread(ask, house) != 401:
            assert time.monotonic() < deadline, "revoked, and served for longer than five seconds"
            await asyncio.sleep(0.2)
    finally:
        assert await asyncio.to_thread(stop_house, house) == 0


def ask(house: House) -> int:
    body = json.dumps({"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello!"}]}).encode()
    headers = {**house.headers, "Content-Type": "application/json", "X-IBEX-Session-ID": "pooled"}
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{house.url}/v1/chat/completions", body, headers)) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code
