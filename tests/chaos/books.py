"""Reading what both stores have in the end, and waiting until it is what the clients saw."""

import asyncio

import asyncpg

from ibex.config import Settings
from ibex.domain.identity import DEV_ORG_ID
from ibex.engines.addresses import resolve_addresses
from ibex.errors import IbexError
from ibex.recorder.survey import survey_journal
from ibex.stores.clickhouse.traces import TraceStore
from tests.chaos.houses import ROUNDS, ChaosHouse, settings_of
from tests.chaos.verdict import Books, find_faults


async def read_books(settings: Settings) -> Books:
    """Read both stores; raises StoreUnavailable, or what asyncpg raises, while one is away."""
    addresses = resolve_addresses(settings)
    connection = await asyncpg.connect(addresses.postgres_admin)
    try:
        checkpoints = await connection.fetch("select * from ibex_core.checkpoints")
        sessions = await connection.fetch("select session_id, external_id, turn_count from ibex_core.sessions")
    finally:
        await connection.close()
    traces = TraceStore(addresses.clickhouse)
    try:
        return Books(checkpoints, sessions, await traces.list(org_ids=[DEV_ORG_ID], limit=None))
    finally:
        await traces.close()


def find_put_aside(settings: Settings) -> list[str]:
    """What the recorder of a node could not deliver."""
    survey = survey_journal(settings)
    letters = [f"{count} dead letters of {sink}" for sink, count in survey.count_dead_letters().items() if count]
    return letters + [f"{path.name} was set aside" for path in survey.quarantined]


async def settle(*houses: ChaosHouse, within: float = 60.0) -> Books:
    """Wait until the stores that these houses share have all that the clients saw; fail with what never became right.

    The last step of the long version is ibex's own judge, `ibexctl reconcile`.
    """
    sights = [sight for house in houses for sight in house.sights]
    faults = ["the stores could not be read"]
    pause = 0.25
    try:
        async with asyncio.timeout(within):
            while True:
                try:
                    books = await read_books(settings_of(houses[0]))
                except (IbexError, OSError, asyncpg.PostgresError):
                    pass
                else:
                    faults = find_faults(sights, books, houses[0].unnoted)
                    if not faults:
                        break
                await asyncio.sleep(pause)
                pause = min(3.0, 1.5 * pause)
    except TimeoutError:
        raise AssertionError(f"{len(faults)} faults:\n" + "\n".join(faults[:20])) from None
    assert [fault for house in houses for fault in find_put_aside(settings_of(house))] == []
    if ROUNDS:
        assert (await asyncio.to_thread(houses[0].ctl, "reconcile", "--settle", "1s"))["is_consistent"]
    return books
