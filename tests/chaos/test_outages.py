"""A store that hangs: callers are served, the other store's records go on, and afterwards everything is there, once."""

import asyncio
import logging
import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from uuid import UUID

import pytest

from ibex.domain.identity import DEV_ORG_ID
from ibex.engines.addresses import resolve_addresses
from ibex.stores.clickhouse.traces import TraceStore
from ibex.stores.postgres.pool import Postgres
from tests.acceptance.conftest import House
from tests.chaos.books import settle
from tests.chaos.houses import OUTAGE_SECONDS, ChaosHouse, node_of, settings_of
from tests.chaos.load import End, Kind, Sight

log = logging.getLogger("chaos")

SLACK = timedelta(seconds=1)
"""Within this time a record must have reached a store that is there: twice what is promised, on a busy machine."""
KINDS = {Kind.JSON: 55, Kind.STREAM: 35, Kind.CUT: 5, Kind.HANG_UP_LATE: 5}


@contextmanager
def hung(house: House, engine: str) -> Iterator[None]:
    """All processes of an engine stand still: connections stay open, and nobody answers."""
    (pid,) = [entry.pid for entry in node_of(house).processes if entry.name == f"engine {engine}"]
    assert pid is not None
    os.killpg(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.killpg(pid, signal.SIGCONT)


def seen_whole(sights: list[Sight]) -> set[UUID]:
    return {sight.turn_id for sight in sights if sight.end is End.WHOLE and sight.turn_id is not None}


async def traced(house: House) -> dict[UUID, timedelta]:
    """Each turn in ClickHouse, and how long after its end it came there."""
    store = TraceStore(resolve_addresses(settings_of(house)).clickhouse)
    try:
        rows = await store.list(org_ids=[DEV_ORG_ID], limit=None)
    finally:
        await store.close()
    return {row["turn_id"]: row["inserted_at"] - row["completed_at"] for row in rows}


async def kept(house: House) -> set[UUID]:
    """Each turn in Postgres."""
    postgres = await Postgres.connect(resolve_addresses(settings_of(house)).postgres_admin, name="chaos")
    try:
        async with postgres.transaction() as connection:
            return {row["turn_id"] for row in await connection.fetch("select turn_id from ibex_core.checkpoints")}
    finally:
        await postgres.close()


@pytest.mark.timeout(600)
async def test_a_store_that_hangs_holds_up_neither_callers_nor_the_other_store(chaos_house: ChaosHouse) -> None:
    house, load = chaos_house, chaos_house.load(clients=8, kinds=KINDS)
    during_outage: dict[str, set[UUID]] = {}
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(load.run())
        for engine in ("postgres", "clickhouse", "valkey"):
            await asyncio.sleep(0.5)
            since = len(load.sights)
            with hung(house, engine):
                await asyncio.sleep(OUTAGE_SECONDS)
                expected = seen_whole(load.sights)
                await asyncio.sleep(SLACK.total_seconds())
                if engine != "clickhouse":
                    assert expected <= (await traced(house)).keys(), f"{engine} holds up traces"
                if engine != "postgres":
                    assert expected <= await kept(house), f"{engine} holds up checkpoints"
                during_outage[engine] = seen_whole(load.sights[since:])
            log.info("%s hung: %d requests, %s", engine, len(load.sights) - since, dict(load.count(since)))
            assert load.failures(since) == Counter(), engine
        load.stop()
    await settle(house)
    lags = await traced(house)
    for engine, turns in during_outage.items():
        ordered = sorted(lags[turn_id] for turn_id in turns)
        middle, late = (ordered[len(ordered) * part // 100].total_seconds() for part in (50, 99))
        log.info("traces while %s hung: visible after %.3f s (p50), %.3f s (p99)", engine, middle, late)
    assert house.ctl("reconcile", "--settle", "1s")["is_consistent"]
