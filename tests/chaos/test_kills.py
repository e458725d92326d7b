"""`kill -9` of everything there is, at random moments under load: no turn whose end a client saw is lost or doubled."""

import asyncio
import logging
import os
import random
import time

import pytest

from tests.chaos.books import settle
from tests.chaos.houses import ROUNDS, ChaosHouse, kill_node, kill_one
from tests.chaos.load import End

log = logging.getLogger("chaos")

ENGINES = ("engine postgres", "engine valkey", "engine clickhouse")
VICTIMS = ("worker 0", "worker 1", "recorder", *ENGINES, "sandbox")
WHOLE_NODES = ("supervisor", "everything")
WORKERS = ("worker 0", "worker 1", *WHOLE_NODES)

ALLOWED = {"sandbox": {"503 PROVIDER_UNAVAILABLE"}}
"""What a kill may cause besides broken connections."""


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
