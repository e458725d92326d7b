"""Ten thousand answers of a hostile provider: each is told and recorded as it was, and nothing of them stays."""

import asyncio
import itertools
import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.acceptance.conftest import House, kept_until_the_end, make_data_dir, start_house
from tests.chaos.books import read_books, settings_of
from tests.hostility import ENDINGS, Attack, every_cut, oddities, wild
from tests.onslaught import TIMEOUTS, Onslaught

log = logging.getLogger("chaos")

REQUESTS = int(os.environ.get("CHAOS_HOSTILE", "0"))
CLIENTS = 64
PARTS = 10
KEPT_SECONDS = 35.0
"""By then no connection to the provider is kept that nobody uses."""
GROWTH_BYTES = 4 << 20
"""How much more memory the worker may have after as many attacks again: 400 bytes for each of ten thousand."""


def choose_attacks(seed: int) -> list[Attack]:
    """Every offset with every ending, as often as need be, among oddities and what is wild."""
    dice = random.Random(seed)
    attacks = list(itertools.islice(wild(seed), REQUESTS // 4)) + oddities() * 4
    cuts = itertools.cycle(every_cut(*ENDINGS))
    attacks += itertools.islice(cuts, max(0, REQUESTS - len(attacks)))
    dice.shuffle(attacks)
    return attacks


async def count_tasks(house: House) -> int:
    """The worker's tasks, as it says: the fewest of some seconds, since a tick's write is a task too."""
    found = []
    for _ in range(4):
        (facts,) = (process["facts"] for process in house.status()["processes"] if process["name"] == "worker 0")
        found.append(int(facts["tasks"]))
        await asyncio.sleep(1.1)
    return min(found)


def count_descriptors(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").glob("*"))


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def attacked_house() -> Iterator[House]:
    """One worker, with short deadlines, on the sandbox."""
    data_dir = make_data_dir()
    settings = {f"IBEX_{name.upper()}": str(value) for name, value in TIMEOUTS.items()}
    house = start_house(data_dir, IBEX_WORKERS="1", IBEX_PROVIDER_RETRIES="0", **settings)
    with kept_until_the_end(house, data_dir):
        yield house


@pytest.mark.skipif(REQUESTS == 0, reason="CHAOS_HOSTILE says how many; tests/server/edge has the short version")
@pytest.mark.timeout(900)
async def test_nothing_of_a_hostile_provider_stays(attacked_house: House, pytestconfig: pytest.Config) -> None:
    house = attacked_house
    seed = pytestconfig.getoption("randomly_seed", 1)
    attacks = choose_attacks(seed)
    (worker,) = house.pids("ibex: worker")
    onslaught = Onslaught(house.url, house.headers, clients=CLIENTS)
    await onslaught.run(attacks)  # the allocator's high water comes with the first thousands
    await asyncio.sleep(KEPT_SECONDS)
    descriptors, tasks = count_descriptors(worker), await count_tasks(house)
    memory = [resident_bytes(worker)]
    for part in range(PARTS):
        await onslaught.run(attacks[part::PARTS])
        memory.append(resident_bytes(worker))
    await asyncio.sleep(KEPT_SECONDS)
    after = count_descriptors(worker), await count_tasks(house)
    log.info("%d requests; memory (MiB) %s", len(onslaught.sights), [round(size / (1 << 20), 1) for size in memory])
    log.info("descriptors %d, then %d; tasks %d, then %d", descriptors, after[0], tasks, after[1])

    assert house.ctl("reconcile", "--settle", "2s")["is_consistent"]
    traces = (await read_books(settings_of(house))).traces
    faults = onslaught.faults({trace["request_id"]: SimpleNamespace(**trace) for trace in traces}.get)
    assert faults == [], f"{len(faults)} with seed {seed}"
    assert after == (descriptors, tasks)
    assert memory[-1] - memory[0] < GROWTH_BYTES
