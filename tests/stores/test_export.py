"""An export holds a handful of checkpoints in memory, however much content they hold and however many there are."""

import tracemalloc

from ibex.domain.turns import Turn
from ibex.runtime import clickhouse_migrator
from ibex.stores.clickhouse.traces import TraceStore
from ibex.stores.export import export_organization
from ibex.stores.postgres.pool import Postgres
from ibex.stores.postgres.sessions import SessionStore
from tests.tenants import Tenant

MEGABYTE = 1_000_000
CHECKPOINTS = 60


async def test_captured_content_is_exported_in_bounded_memory(
    owner: Postgres, app: Postgres, tenant: Tenant, clickhouse_dsn: str
) -> None:
    async with clickhouse_migrator(clickhouse_dsn) as migrator:
        await migrator.up()
    turns: list[Turn] = [
        tenant.make_turn(messages=b"m" * MEGABYTE, completion=b"\xff\xc3\xa9") for _ in range(CHECKPOINTS)
    ]
    await SessionStore(app).record(turns)
    turns.clear()
    traces, seen = TraceStore(clickhouse_dsn), 0
    tracemalloc.start()
    async for kind, row in export_organization(owner, traces, tenant.org_id):
        if kind == "checkpoints":
            assert (len(row["messages"]), row["completion"]) == (MEGABYTE, "\ufffd\u00e9")
            seen += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    await traces.close()
    assert seen == CHECKPOINTS
    assert peak < 25 * MEGABYTE
