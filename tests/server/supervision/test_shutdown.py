"""The stop of a node, with small workers: what it says while it lasts, and what it says it cut."""

import asyncio
import os
import signal
from pathlib import Path

import aiohttp
import pytest

from ibex.config import Settings
from ibex.errors import OperatorError
from ibex.server.messages import Unfinished
from ibex.server.supervision.status import request_reload, request_status
from tests.server.nodes import Node, eventually, is_alive, running


def with_times(settings: Settings, *, timeout: float, delay: float = 0.0) -> Settings:
    return settings.model_copy(update={"shutdown_timeout": timeout, "shutdown_delay": delay})


async def test_what_is_not_finished_in_time_is_cut_and_counted_by_worker(settings: Settings) -> None:
    async with running(with_times(settings, timeout=0.3)) as node:
        slow = asyncio.gather(*(node.ask("/slow?90") for _ in range(5)), return_exceptions=True)
        await seen_in_flight(node, 5)
        held = {process.name: process.facts.get("in_flight", 0) for process in node.status.processes[1:]}
        result = await node.stop()
        outcomes = await slow

    assert all(isinstance(outcome, aiohttp.ClientError) for outcome in outcomes)
    assert not result.is_clean
    assert dict(result.unfinished) == {name: Unfinished(count, 0) for name, count in held.items() if count}
    assert result.facts["cut_requests"] == 5


async def test_a_second_signal_waits_for_nobody_and_says_so(settings: Settings) -> None:
    async with running(with_times(settings, timeout=100)) as node:
        pids = await node.pids()
        slow = asyncio.gather(node.ask("/slow?90"), return_exceptions=True)
        await asyncio.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(0.2)
        assert not node.task.done()
        os.kill(os.getpid(), signal.SIGINT)
        result = await asyncio.wait_for(node.task, 20)
        (outcome,) = await slow

    assert isinstance(outcome, aiohttp.ClientError)
    assert not any(is_alive(pid) for pid in pids)
    assert result.is_hurried
    assert [cut for _, cut in result.unfinished] == [Unfinished(1, 0)]


async def test_a_worker_that_falls_while_it_drains_has_cut_what_it_last_said_it_had(settings: Settings) -> None:
    async with running(with_times(settings, timeout=100)) as node:
        slow = asyncio.gather(*(node.ask("/slow?90") for _ in range(8)), return_exceptions=True)
        await seen_in_flight(node, 8)
        workers = node.status.processes[1:]
        os.kill(os.getpid(), signal.SIGTERM)
        await eventually(lambda: _returns(node.status.stop is not None))
        for worker in workers:
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGKILL)
        result = await asyncio.wait_for(node.task, 20)
        await slow

    assert result.facts["cut_requests"] == 8


async def test_status_tells_of_the_drain_and_reload_is_refused_meanwhile(settings: Settings) -> None:
    async with running(with_times(settings, timeout=60)) as node:
        slow = asyncio.gather(node.ask("/slow?90"), return_exceptions=True)
        await seen_in_flight(node, 1)
        node.supervisor.stop()
        await eventually(lambda: _returns(node.status.stop is not None))
        status = await asyncio.to_thread(request_status, settings)
        with pytest.raises(OperatorError, match="The server is stopping"):
            await asyncio.to_thread(request_reload, settings)
        await node.stop()
        await slow

    assert status.stop is not None
    assert status.stop.doing == "draining"
    assert 50 < status.stop.seconds_left <= 60
    assert sum(process.facts.get("in_flight", 0) for process in status.processes) == 1


async def test_a_reload_under_way_ends_with_the_stop_and_leaves_no_process(settings: Settings) -> None:
    stuck = settings.model_copy(update={"openai_models": ("stuck",)})
    before = _children()
    async with running(settings, reload=lambda: stuck) as node:
        refusal = asyncio.create_task(asyncio.to_thread(request_reload, settings))
        await eventually(lambda: _returns(len(_children() - before) == 3))
        await node.stop()
        with pytest.raises(OperatorError, match="The server is stopping"):
            await refusal

        assert _children() <= before


async def test_before_it_leaves_a_node_says_so_and_serves_on(settings: Settings) -> None:
    async with running(with_times(settings, timeout=10, delay=0.5)) as node:
        assert await _readiness(node) == 200
        node.supervisor.stop()
        await eventually(lambda: _is_unready(node))
        stop = node.status.stop
        assert await node.ask()
        result = await asyncio.wait_for(node.task, 20)

    assert stop is not None
    assert stop.doing == "leaving"
    assert result.seconds >= 0.5


async def test_a_worker_that_comes_back_while_the_node_leaves_says_so_too(settings: Settings) -> None:
    async with running(with_times(settings, timeout=10, delay=100)) as node:
        node.supervisor.stop()
        former = node.pid("worker 0")
        assert former is not None
        os.kill(former, signal.SIGKILL)
        await eventually(lambda: _returns(node.pid("worker 0") not in {former, None}))
        await eventually(lambda: _are_two(node))
        assert {await _readiness(node) for _ in range(20)} == {503}
        node.supervisor.stop()  # a second order waits for no load balancer
        result = await asyncio.wait_for(node.task, 20)

    assert result.is_hurried
    assert result.is_clean


async def seen_in_flight(node: Node, count: int) -> None:
    """Wait until the workers have reported so many requests."""

    async def holds() -> bool:
        return sum(process.facts.get("in_flight", 0) for process in node.status.processes) == count

    await eventually(holds)


async def _returns(value: bool) -> bool:
    return value


async def _readiness(node: Node) -> int:
    async with node.http.get(f"{node.status.url}/ready") as response:
        return response.status


async def _is_unready(node: Node) -> bool:
    return await _readiness(node) == 503


async def _are_two(node: Node) -> bool:
    return len(await node.pids()) == 2


def _children() -> set[str]:
    """The processes that this one has started, engines of the test session among them."""
    return set(Path("/proc/thread-self/children").read_text().split())
