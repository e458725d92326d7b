"""No trace of an erased organization stays, whatever fails in between, and nobody else's is late or double for it."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from uuid import uuid4

import pytest

from ibex.domain.identity import OrgId
from ibex.domain.turns import Turn
from ibex.errors import StoreUnavailable
from ibex.recorder.sinks import TraceSink
from ibex.recorder.take_backs import TakeBacks
from ibex.stores.clickhouse.traces import TraceStore
from tests.conftest import run_clickhouse
from tests.recorder.conftest import House
from tests.turns import ORG, make_turn

ERASED = OrgId(uuid4())


@pytest.fixture
async def store(house: House) -> AsyncIterator[TraceStore]:
    store = await TraceStore.connect(house.clickhouse_dsn)
    yield store
    await store.close()


@pytest.fixture
def take_backs(house: House, store: TraceStore) -> TakeBacks:
    return TakeBacks(store.erasure, house.metrics)


@pytest.fixture
def sink(house: House, store: TraceStore, take_backs: TakeBacks) -> TraceSink:
    return TraceSink(store, house.metrics, take_backs)


async def count(store: TraceStore, org_id: OrgId) -> int:
    return len(await store.list(org_ids=[org_id], limit=None))


async def until_gone(store: TraceStore) -> None:
    async with asyncio.timeout(20):
        while await count(store, ERASED):  # noqa: ASYNC110 - ClickHouse tells nobody when it is done
            await asyncio.sleep(0.02)


def deletions(house: House) -> int:
    answer = run_clickhouse(
        house.clickhouse_dsn, "select count() from system.mutations where database = currentDatabase()"
    )
    return int(answer)


async def test_what_a_killed_recorder_inserted_is_taken_back_by_its_successor(
    store: TraceStore, sink: TraceSink, take_backs: TakeBacks
) -> None:
    """It was killed between the insert and the question: the successor finds everything stored, and must ask for it."""
    turns = [make_turn(org_id=ERASED), make_turn()]
    await store.insert(turns, "t")
    await store.erasure.note(ERASED)
    assert await sink.send(turns, token="t", is_doubtful=True) == []
    await take_backs.settle()
    await until_gone(store)
    assert await count(store, OrgId(ORG)) == 1


async def test_a_look_up_that_fails_holds_back_nobody_and_is_owed(
    house: House, store: TraceStore, sink: TraceSink, take_backs: TakeBacks
) -> None:
    await store.erasure.note(ERASED)
    run_clickhouse(house.clickhouse_dsn, "rename table erased_organizations to hidden")
    for number in range(3):
        assert await sink.send([make_turn(org_id=ERASED), make_turn()], token=f"t{number}", is_doubtful=False) == []
        with pytest.raises(StoreUnavailable):
            await take_backs.settle()
    assert await count(store, OrgId(ORG)) == 3
    run_clickhouse(house.clickhouse_dsn, "rename table hidden to erased_organizations")
    await take_backs.settle()
    await until_gone(store)
    assert await count(store, OrgId(ORG)) == 3
    assert house.metrics.erased_turns_dropped_total.labels("clickhouse").value == 3


async def test_a_backlog_of_an_erased_organization_costs_one_deletion(
    house: House, store: TraceStore, sink: TraceSink, take_backs: TakeBacks
) -> None:
    await store.erasure.note(ERASED)
    for number in range(20):
        await sink.send([make_turn(org_id=ERASED), make_turn()], token=f"t{number}", is_doubtful=False)
        if number % 5 == 4:
            await take_backs.settle()
    await until_gone(store)
    assert deletions(house) == 1
    assert await count(store, OrgId(ORG)) == 20
    assert house.metrics.erased_turns_dropped_total.labels("clickhouse").value == 20


async def test_a_batch_without_its_erased_turns_is_the_same_batch(
    house: House, store: TraceStore, take_backs: TakeBacks
) -> None:
    """Sent whole, then without them, and the other way round: the others are stored once."""
    await store.erasure.note(ERASED)
    whole = [TraceSink(store, house.metrics, TakeBacks(store.erasure, house.metrics)) for _ in range(2)]
    first, second = ([make_turn(org_id=ERASED), make_turn(), make_turn()] for _ in range(2))
    await whole[0].send(first, token="1", is_doubtful=False)
    take_backs.owe(first)
    await take_backs.settle()
    assert take_backs.erased == {ERASED}
    knowing = TraceSink(store, house.metrics, take_backs)
    await knowing.send(first, token="1", is_doubtful=False)
    await knowing.send(second, token="2", is_doubtful=False)
    await whole[1].send(second, token="2", is_doubtful=False)
    assert await count(store, OrgId(ORG)) == 4


async def test_all_attempts_at_a_batch_leave_out_the_same(
    house: House, store: TraceStore, sink: TraceSink, take_backs: TakeBacks
) -> None:
    """Its halves are named by their place in it: an erasure that is learnt between two attempts must not shift them."""
    bad, known = make_turn(attempts=70_000), [make_turn(org_id=ERASED) for _ in range(2)]
    turns = [bad, *known, make_turn(), make_turn(), make_turn()]
    insert = store.insert

    async def lose_second_half(some: list[Turn], token: str) -> None:
        if token == "t1":
            raise StoreUnavailable("ClickHouse is away.")
        await insert(some, token)

    store.insert = lose_second_half  # type: ignore[assignment, method-assign]
    with pytest.raises(StoreUnavailable):
        await sink.send(turns, token="t", is_doubtful=False)
    store.insert = insert  # type: ignore[method-assign]
    await store.erasure.note(ERASED)
    take_backs.owe(known)
    await take_backs.settle()
    assert [turn for turn, _ in await sink.send(turns, token="t", is_doubtful=False)] == [bad]
    assert await count(store, OrgId(ORG)) == 3


async def test_what_a_dead_recorder_owed_is_swept_but_not_from_under_an_erasure(
    house: House, store: TraceStore, take_backs: TakeBacks
) -> None:
    await store.insert([make_turn(org_id=ERASED), make_turn()], "t")
    await store.erasure.note(ERASED)
    await take_backs.sweep()
    assert await count(store, ERASED) == 1, "the erasure counts what it deletes"
    await TakeBacks(store.erasure, house.metrics, erasure_time=timedelta()).sweep()
    await until_gone(store)
    assert await count(store, OrgId(ORG)) == 1
