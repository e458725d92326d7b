"""A provider that breaks its answers in every way: the client is told the truth, and nothing is left behind."""

import asyncio
import contextlib
import gc
import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from ibex.pipeline.chat import Exchange
from ibex.pipeline.recording import OpenTurn
from ibex.providers.answer import Answer
from ibex.providers.base import ProviderReply
from ibex.providers.connection import Connection
from ibex.server.edge.wire import WireReply
from tests.hostility import Attack, Framing, every_cut, oddities, wild
from tests.onslaught import TIMEOUTS, Onslaught
from tests.server.conftest import Edge
from tests.waiting import eventually

T = TypeVar("T")

OF_ONE_REQUEST = (Exchange, OpenTurn, WireReply, ProviderReply, Answer)
CLIENTS = 24
WILD = 120

hostile = pytest.mark.parametrize("edge", [TIMEOUTS], indirect=True)


async def attack(edge: Edge, attacks: list[Attack]) -> None:
    """Have all of them asked for; every sight and every turn must be true, and nothing may be left."""
    onslaught = Onslaught(edge.url, edge.headers(), clients=CLIENTS)
    await onslaught.run(attacks[:1])  # what is started with the first requests is there from now on
    await settle(edge)
    tasks, descriptors = count_tasks(), count_descriptors()
    await onslaught.run(attacks)
    turns = {turn.request_id: turn for turn in edge.turns()}
    assert onslaught.faults(turns.get) == []
    await settle(edge)
    assert await last_of(count_tasks, lambda count: count <= tasks) <= tasks
    assert await last_of(count_descriptors, lambda count: count <= descriptors) <= descriptors
    assert await last_of(find_left_behind, lambda found: not found) == Counter()


async def last_of(measure: Callable[[], T], is_fine: Callable[[T], bool]) -> T:
    """What is measured as soon as it is fine, else after a while: a released answer is given a second to end."""
    with contextlib.suppress(TimeoutError):
        await eventually(lambda: is_fine(measure()), within=5)
    return measure()


async def settle(edge: Edge) -> None:
    """Until no connection is left of what was asked so far; those that are kept are closed."""
    (provider,) = edge.worker.providers
    transport = provider._transport
    await eventually(lambda: transport.open_connections == transport.idle_connections)
    for connection in tuple(transport._idle):
        connection.abort()
    await eventually(lambda: edge.sandbox.open_connections == transport.open_connections == 0)
    await eventually(lambda: edge.metrics.active_connections.labels().value == 0)


def count_tasks() -> int:
    return len(asyncio.all_tasks())


def count_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").glob("*"))


def find_left_behind() -> Counter[str]:
    gc.collect()
    found = (type(thing) for thing in gc.get_objects() if isinstance(thing, (*OF_ONE_REQUEST, Connection)))
    return Counter(kind.__name__ for kind in found)


@hostile
async def test_a_connection_may_close_at_any_byte_of_an_answer(edge: Edge) -> None:
    await attack(edge, every_cut("close", framings=(Framing.LENGTH,)) + every_cut("close")[::5])


@hostile
async def test_an_answer_may_hang_trickle_or_lie_about_its_length(edge: Edge) -> None:
    await attack(edge, oddities() + every_cut("half_close", "reset", "hang", "keep")[::61])


@hostile
async def test_an_answer_may_be_garbage(edge: Edge, pytestconfig: pytest.Config) -> None:
    seed = pytestconfig.getoption("randomly_seed", 1)
    await attack(edge, list(itertools.islice(wild(seed), WILD)))
