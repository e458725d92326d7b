"""Stores that are stopped, for long: callers go on, the records wait, and afterwards everything is there, once."""

import asyncio
import logging
import random
from collections import Counter

import aiohttp
import pytest

from tests.chaos.books import settle
from tests.chaos.houses import OUTAGE_SECONDS, ChaosHouse, in_the_long_version, kill_one
from tests.chaos.load import End, Kind, Load
from tests.chaos.stores import OwnStores

log = logging.getLogger("chaos")

KINDS = {Kind.JSON: 55, Kind.STREAM: 35, Kind.CUT: 5, Kind.HANG_UP_LATE: 5}
FULL = {"503 SERVICE_DEGRADED"}


async def readiness(house: ChaosHouse) -> tuple[int, str, str]:
    """The status code and word of /ready, and what it says of the journal."""
    async with aiohttp.ClientSession() as http, http.get(f"{house.url}/ready") as response:
        answer = await response.json()
        return response.status, answer["status"], answer["checks"]["journal"].get("message", "")


async def become(house: ChaosHouse, status: int, word: str, about: str = "") -> None:
    """Wait until /ready says so."""
    async with asyncio.timeout(180):
        answer = await readiness(house)
        while answer[:2] != (status, word) or about not in answer[2]:
            await asyncio.sleep(0.2)
            answer = await readiness(house)


async def stop_and_wait(node: ChaosHouse, load: Load, stores: OwnStores, name: str) -> None:
    """Stop a store for the time of an outage; none of the callers, who are known, may notice."""
    await asyncio.sleep(1)
    since = len(load.sights)
    async with stores.away(name):
        await become(node, 200, "degraded")
        await asyncio.sleep(OUTAGE_SECONDS)
    await become(node, 200, "ok")
    log.info("%s stopped: %d requests, %s", name, len(load.sights) - since, dict(load.count(since)))
    assert load.failures(since) == Counter(), name


@in_the_long_version
@pytest.mark.timeout(900)
async def test_a_store_that_is_stopped_stops_no_known_caller_and_loses_no_record(own_stores: OwnStores) -> None:
    node = await own_stores.open_node()
    load = node.load(clients=12, kinds=KINDS)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(load.run())
        for name in ("postgres", "clickhouse", "valkey"):
            await stop_and_wait(node, load, own_stores, name)
        load.stop()
    await settle(node)


@in_the_long_version
@pytest.mark.timeout(900)
async def test_without_postgres_and_redis_nobody_is_served_and_with_them_again_everybody(own_stores: OwnStores) -> None:
    node = await own_stores.open_node()
    load = node.load(clients=12, kinds=KINDS)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(load.run())
        await asyncio.sleep(1)
        async with own_stores.away("postgres"), own_stores.away("valkey"):
            await become(node, 503, "unhealthy")
            await asyncio.sleep(8)  # what was heard is believed for five seconds
            since = len(load.sights)
            await asyncio.sleep(3)
            assert set(load.count(since)) == {End.REFUSED}
            assert load.failures(allowed=FULL) == Counter()
        await become(node, 200, "ok")
        await asyncio.sleep(2)
        since = len(load.sights)
        await asyncio.sleep(3)
        assert load.failures(since) == Counter()
        assert load.count(since)[End.WHOLE] > 0
        load.stop()
    await settle(node)


@in_the_long_version
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["postgres", "clickhouse"])
async def test_an_outage_longer_than_the_journal_refuses_before_forwarding_and_ends_by_itself(
    own_stores: OwnStores, name: str
) -> None:
    node = await own_stores.open_node(IBEX_JOURNAL_MAX_BYTES=str(2 << 20), IBEX_JOURNAL_SEGMENT_BYTES=str(64 << 10))
    load = node.load(clients=12, kinds=KINDS, pause=0.02)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(load.run())
        await asyncio.sleep(1)
        async with own_stores.away(name):
            await become(node, 200, "degraded", "% full")
            assert load.failures() == Counter(), "nobody is refused before the bound"
            await become(node, 503, "unhealthy")
            await asyncio.sleep(3)
            assert load.failures(allowed=FULL) == Counter()
            assert load.failures() != Counter(), "nobody was refused at the bound"
        await become(node, 200, "ok")
        await asyncio.sleep(3)  # each worker looks at the journal for itself
        since = len(load.sights)
        await asyncio.sleep(3)
        log.info("the journal was full for want of %s: %s", name, dict(load.failures()))
        assert load.failures(since) == Counter()
        assert load.count(since)[End.WHOLE] > 0
        load.stop()
    await settle(node)


@in_the_long_version
@pytest.mark.timeout(900)
async def test_a_server_that_ends_while_postgres_is_away_delivers_when_it_is_started_again(
    own_stores: OwnStores,
) -> None:
    node = await own_stores.open_node()
    load = node.load(clients=12, kinds=KINDS)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(load.run())
        await asyncio.sleep(1)
        async with own_stores.away("postgres"):
            since = len(load.sights)
            await asyncio.sleep(5)
            assert load.failures(since) == Counter()
            load.stop()
            await asyncio.sleep(1)
            assert await asyncio.to_thread(node.end) == 0
    await asyncio.to_thread(node.start_again)
    await settle(node)


@in_the_long_version
@pytest.mark.timeout(900)
async def test_two_nodes_whose_recorders_die_share_sessions_without_a_gap(own_stores: OwnStores) -> None:
    nodes = [await own_stores.open_node() for _ in range(2)]
    loads = [node.load(clients=8, kinds=KINDS, sessions=5) for node in nodes]
    async with asyncio.TaskGroup() as tasks:
        for load in loads:
            tasks.create_task(load.run())
        for number in range(10):
            await asyncio.sleep(random.uniform(0.2, 1.5))
            await asyncio.gather(*(kill_one(node, "recorder") for node in nodes[: 2 - number % 2]))
        for load in loads:
            assert load.failures() == Counter()
            load.stop()
    books = await settle(*nodes)
    shared = Counter(row["external_id"] for row in books.sessions)
    assert sum(name.startswith("chaos-shared-") for name in shared) == 5
    log.info("two nodes: %d turns in %d sessions", len(books.checkpoints), len(books.sessions))
