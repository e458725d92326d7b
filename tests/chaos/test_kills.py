"""`kill -9` of everything there is, at random moments under load: no turn whose end a client saw is lost or doubled."""

import asyncio
import logging
import os
import random
import signal
import time
from contextlib import suppress

import pytest

from ibex.errors import ServerNotRunning
from ibex.server.status import NodeStatus, request_status
from tests.acceptance.conftest import House
from tests.chaos.books import settings_of, settle
from tests.chaos.conftest import ROUNDS, ChaosHouse
from tests.chaos.load import End

log = logging.getLogger("chaos")

ENGINES = ("engine postgres", "engine valkey", "engine clickhouse")
VICTIMS = ("worker 0", "worker 1", "recorder", *ENGINES, "sandbox")
WHOLE_NODES = ("supervisor", "everything")
WORKERS = ("worker 0", "worker 1", *WHOLE_NODES)

ALLOWED = {"sandbox": {"503 PROVIDER_UNAVAILABLE"}}
"""What a kill may cause besides broken connections."""


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


async def kill_node(house: ChaosHouse, victim: str) -> None:
    """Kill the supervisor alone, or every process at once; then start anew on the same data."""
    pids = [entry.pid for entry in node_of(house).processes if entry.pid is not None]
    for pid in pids if victim == "everything" else pids[:1]:
        os.kill(pid, signal.SIGKILL)
    await asyncio.to_thread(house.bury)
    await asyncio.to_thread(house.start_again)


def choose_victims() -> list[str]:
    """So many at random, of those that `CHAOS_VICTIMS` names; in the short version one of each sort."""
    if not ROUNDS:
        return [random.choice(("worker 0", "worker 1")), "recorder", *ENGINES, "sandbox", "everything"]
    names = os.environ.get("CHAOS_VICTIMS", ",".join((*VICTIMS, *WHOLE_NODES))).split(",")
    return [random.choice(names) for _ in range(ROUNDS)]


@pytest.mark.timeout(3600)
async def test_no_kill_loses_or_doubles_a_turn(chaos_house: ChaosHouse) -> None:
    house, load = chaos_house, chaos_house.load(clients=24 if ROUNDS else 8)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(load.run())
        for number, victim in enumerate(choose_victims()):
            await asyncio.sleep(random.uniform(0.1, 0.7))
            since, began = len(load.sights), time.monotonic()
            await (kill_node if victim in WHOLE_NODES else kill_one)(house, victim)
            await asyncio.sleep(0.2)
            log.info("%d %s: %.1f s, %s", number, victim, time.monotonic() - began, dict(load.count(since)))
            if victim not in WORKERS:
                assert not load.failures(since, allowed=ALLOWED.get(victim, ())), victim
        load.stop()
    books = await settle(house)
    log.info("%d requests, %s", len(load.sights), dict(load.count()))
    log.info("%d checkpoints, %d traces", len(books.checkpoints), len(books.traces))
    assert load.count()[End.WHOLE] > 50
