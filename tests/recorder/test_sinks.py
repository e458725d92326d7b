"""What ClickHouse may have of a batch is looked up, and only the rest is sent."""

from ibex.domain.identity import OrgId
from ibex.recorder.sinks import TraceSink
from ibex.recorder.take_backs import TakeBacks
from ibex.stores.clickhouse.traces import TraceStore
from tests.recorder.conftest import House
from tests.turns import ORG, make_turn


async def test_the_rest_of_a_doubtful_batch_is_sent_even_when_its_token_is_known(house: House) -> None:
    turns = [make_turn() for _ in range(30)]
    store = await TraceStore.connect(house.clickhouse_dsn)
    sink = TraceSink(store, house.metrics, TakeBacks(store.erasure, house.metrics))
    await store.insert(turns[:10], "token")
    for _ in range(2):
        assert await sink.send(turns, token="token", is_doubtful=True) == []
    assert len(await store.list(org_ids=[OrgId(ORG)], limit=None)) == 30
    await store.close()


async def test_a_doubtful_batch_whose_token_is_forgotten_is_stored_once(house: House) -> None:
    turns = [make_turn() for _ in range(30)]
    store = await TraceStore.connect(house.clickhouse_dsn)
    sink = TraceSink(store, house.metrics, TakeBacks(store.erasure, house.metrics))
    await store.insert(turns, "forgotten")
    await sink.send(turns, token="token", is_doubtful=True)
    assert len(await store.list(org_ids=[OrgId(ORG)], limit=None)) == 30
    await store.close()
