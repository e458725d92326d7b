"""The books are read from the stores themselves: a row that is taken out of one, or put in twice, is noticed."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

from ibex.engines.addresses import StoreAddresses, resolve_addresses
from tests.chaos.books import read_books, settle
from tests.chaos.houses import ChaosHouse, settings_of
from tests.chaos.load import End, Kind
from tests.chaos.verdict import find_faults
from tests.conftest import run_clickhouse

DOUBLE = "a row that is there twice"


async def find(house: ChaosHouse) -> list[str]:
    return find_faults(house.sights, await read_books(settings_of(house)), house.unnoted)


@asynccontextmanager
async def checkpoint_lost(addresses: StoreAddresses, request_id: object) -> AsyncIterator[None]:
    """Without one checkpoint."""
    connection = await asyncpg.connect(addresses.postgres_admin)
    try:
        await connection.execute("create temp table kept as table ibex_core.checkpoints with no data")
        lost = "with lost as (delete from ibex_core.checkpoints where request_id = $1 returning *)"
        assert await connection.execute(f"{lost} insert into kept select * from lost", request_id) == "INSERT 0 1"
        yield
        await connection.execute("insert into ibex_core.checkpoints table kept")
    finally:
        await connection.close()


@asynccontextmanager
async def trace_doubled(addresses: StoreAddresses, request_id: object) -> AsyncIterator[None]:
    """With one trace twice."""
    copied = f"SELECT * REPLACE('{DOUBLE}' AS provider) FROM llm_traces WHERE request_id = '{request_id}'"
    run_clickhouse(addresses.clickhouse, f"INSERT INTO llm_traces {copied}")
    yield
    run_clickhouse(addresses.clickhouse, f"DELETE FROM llm_traces WHERE provider = '{DOUBLE}'")


async def test_a_row_that_is_lost_or_doubled_in_a_store_is_noticed(chaos_house: ChaosHouse) -> None:
    house, load = chaos_house, chaos_house.load(clients=2, kinds={Kind.JSON: 1})
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(load.run())
        while load.count()[End.WHOLE] < 3:  # noqa: ASYNC110 - there is nothing that could be awaited
            await asyncio.sleep(0.05)
        load.stop()
    await settle(house)
    request_id = load.sights[0].request_id
    addresses = resolve_addresses(settings_of(house))

    async with checkpoint_lost(addresses, request_id):
        assert any(str(request_id) in fault and "no checkpoint" in fault for fault in await find(house))
    assert await find(house) == []
    async with trace_doubled(addresses, request_id):
        assert f"2 traces of request_id {request_id}" in await find(house)
    assert await find(house) == []
