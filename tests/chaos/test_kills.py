"""`kill -9` of everything there is, at random moments under load: no turn whose end a client saw is lost or doubled."""

import asyncio
import logging
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from ibex.domain.identity import DEV_ORG_ID
from ibex.errors import ServerNotRunning
from ibex.server.status import NodeStatus, request_status
from tests.acceptance.conftest import House, start_house
from tests.chaos.books import settings_of, settle
from tests.chaos.load import End, Load

log = logging.getLogger("chaos")

ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "0"))
"""Of the long version, `make test-chaos`; else every victim has one turn."""
VICTIMS = ("worker 0", "recorder", "engine postgres", "worker 1", "engine valkey", "engine clickhouse", "sandbox")
WHOLE_NODES = ("supervisor", "everything")
WORKERS = ("worker 0", "worker 1", *WHOLE_NODES)

ALLOWED = {"sandbox": {"503 PROVIDER_UNAVAILABLE"}}
"""What a kill may cause besides broken connections."""

OpenHouse = Callable[..., House]


def node_of(house: House) -> NodeStatus:
    return request_status(settings_of(house))


async def all_up(house: House, restarts: int = 0) -> None:
    """Wait until every process serves, after at least so many restarts in all."""
    async with asyncio.timeout(60):
        while True:
            with suppress(ServerNotRunning):
                node = await asyncio.to_thread(node_of, house)
                if all(entry.is_up for entry in node.processes) and sum(p.restarts for p in node.processes) >= restarts:
                    return
            await asyncio.sleep(0.05)


async def kill_one(house: House, victim: str) -> None:
    node = node_of(house)
    (pid,) = [entry.pid for entry in node.processes if entry.name == victim]
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await all_up(house, sum(entry.restarts for entry in node.processes) + 1)


async def kill_node(house: House, victim: str) -> None:
    """Kill the supervisor alone, or every process at once; then start anew on the same data."""
    pids = [entry.pid for entry in node_of(house).processes if entry.pid is not None]
    for pid in pids if victim == "everything" else pids[:1]:
        os.kill(pid, signal.SIGKILL)
    await asyncio.to_thread(house.process.wait)
    if house.process.stdout is not None:
        house.process.stdout.close()
    again = await asyncio.to_thread(start_house, Path(house.environ["IBEX_DATA_DIR"]))
    assert "url" in again.facts, again.facts
    house.process, house.facts = again.process, again.facts


@pytest.mark.timeout(1800)
async def test_no_kill_loses_or_doubles_a_turn(open_house: OpenHouse) -> None:
    house = open_house()
    house.ctl("org", "limit", str(DEV_ORG_ID), "--rpm", "1000000")
    load = Load(lambda: house.url, house.headers)
    choice = os.environ.get("CHAOS_VICTIMS", ",".join((*VICTIMS, *WHOLE_NODES))).split(",")
    victims = [random.choice(choice) for _ in range(ROUNDS)] or [*VICTIMS, "everything"]
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(load.run())
        for number, victim in enumerate(victims):
            await asyncio.sleep(random.uniform(0.2, 0.8))
            since, began = len(load.sights), time.monotonic()
            await (kill_node if victim in WHOLE_NODES else kill_one)(house, victim)
            await asyncio.sleep(0.2)
            counted = load.count(since)
            log.info("%d %s: %.1f s, %s", number, victim, time.monotonic() - began, dict(counted))
            if victim not in WORKERS:
                assert not load.failures(since, allowed=ALLOWED.get(victim, ())), victim
            if ROUNDS and number % 10 == 9:
                await all_up(house)
        load.stop()
    books = await settle(house, load.sights)
    log.info("%d requests, %s", len(load.sights), dict(load.count()))
    log.info("%d checkpoints, %d traces", len(books.checkpoints), len(books.traces))
    assert load.count()[End.WHOLE] > 50
