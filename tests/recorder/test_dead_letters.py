"""Dead letters of erased organizations are dropped, page by page, beside the delivery and without stopping it."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from uuid import UUID, uuid4

import pytest

from ibex.domain.identity import OrgId
from ibex.domain.turns import encode_turn
from ibex.recorder.erasure import forget_erased
from ibex.recorder.ledger import DATABASE_NAME, Batch, Ledger, Place, Refusal
from ibex.stores.clickhouse.traces import TraceStore
from tests.recorder.conftest import House
from tests.turns import ORG, make_turn

ERASED = OrgId(uuid4())


@pytest.fixture
def ledger(house: House) -> Iterator[Ledger]:
    house.journal_dir.mkdir(parents=True, exist_ok=True)
    with closing(Ledger(house.journal_dir)) as ledger:
        yield ledger


def put_aside(ledger: Ledger, payloads: list[bytes], org_id: UUID | None = None) -> None:
    refusals = [Refusal("s", start, None, "refused", payload, org_id) for start, payload in enumerate(payloads)]
    ledger.finish("clickhouse", Batch((Place("s", 0, 9),), 0.0), refusals)


@asynccontextmanager
async def forgetting(house: House, ledger: Ledger) -> AsyncIterator[None]:
    traces, stop = TraceStore(house.clickhouse_dsn), asyncio.Event()
    await traces.erasure.note(ERASED)
    try:
        async with asyncio.TaskGroup() as tasks, asyncio.timeout(20):
            tasks.create_task(forget_erased(ledger, traces.erasure, stop))
            yield
            stop.set()
    finally:
        await traces.close()


async def until_left(ledger: Ledger, count: int) -> None:
    while ledger.count_dead_letters() > count:  # noqa: ASYNC110 - nothing to await
        await asyncio.sleep(0.01)


async def test_a_nodes_recorder_drops_the_dead_letters_of_whom_another_erased(house: House, ledger: Ledger) -> None:
    payloads = [encode_turn(make_turn(org_id=ERASED)), encode_turn(make_turn()), b"no turn"]
    put_aside(ledger, payloads)
    async with forgetting(house, ledger):
        await until_left(ledger, 2)
    assert [letter.payload for letter in ledger.dead_letters()] == payloads[1:]
    assert payloads[0] not in (house.journal_dir / DATABASE_NAME).read_bytes()


async def test_the_ledger_of_an_earlier_version_is_read_once_for_whose_its_letters_are(house: House) -> None:
    payloads = [encode_turn(make_turn(org_id=org)) for org in (ERASED, ORG)] + [b"no turn"]
    house.journal_dir.mkdir(parents=True)
    with closing(Ledger(house.journal_dir)) as ledger:
        put_aside(ledger, payloads)
    with closing(sqlite3.connect(house.journal_dir / DATABASE_NAME)) as earlier:
        earlier.executescript("drop index dead_letters_by_organization; alter table dead_letters drop column org_id;")
    with closing(Ledger(house.journal_dir)) as ledger:
        async with forgetting(house, ledger):
            await until_left(ledger, 2)
        assert ledger.dead_letter_organizations() == {ORG}
        assert ledger.learn_organizations(lambda _: pytest.fail("read twice")) == 0


async def test_many_dead_letters_do_not_stop_the_delivery(house: House, ledger: Ledger) -> None:
    """Those whose organization is known are not read at all, and dropped in pages between which others have a turn."""
    put_aside(ledger, [bytes(2000)] * 5000, ERASED)
    turns = 0
    async with forgetting(house, ledger):
        while ledger.count_dead_letters():
            turns += 1
            await asyncio.sleep(0)
    assert turns >= 25


async def test_a_ledger_that_cannot_be_read_ends_nobody(
    house: House, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    put_aside(ledger, [encode_turn(make_turn(org_id=ERASED))])
    ledger._database.execute("drop index dead_letters_by_organization")
    ledger._database.execute("alter table dead_letters rename to hidden")
    async with forgetting(house, ledger):
        while "dead letters not looked through" not in caplog.text:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
