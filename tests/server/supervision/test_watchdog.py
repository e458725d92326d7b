"""A worker that hangs is told from one that works, ended, and replaced."""

import asyncio
import contextlib
import os
import signal

import pytest

from ibex.config import Settings
from tests.server.nodes import Node, eventually, running


async def test_a_worker_that_hangs_says_where_is_ended_and_replaced(
    settings: Settings, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    impatient = settings.model_copy(update={"watchdog_seconds": 5})
    async with running(impatient) as node:
        stopped, hanging = node.pid("worker 0"), node.pid("worker 1")
        assert stopped is not None
        await _hang(node, slot=1)
        os.kill(stopped, signal.SIGSTOP)  # it cannot even be asked where it stands
        await eventually(lambda: _returns(node.pid("worker 0") not in {stopped, None}))
        await eventually(lambda: _returns(node.pid("worker 1") not in {hanging, None}))
        await eventually(lambda: _are_two(node))

    said = capfd.readouterr().err
    assert "Fatal Python error: Aborted" in said
    assert "in _answer" in said
    ended = [record for record in caplog.records if record.message == "process says nothing; ending it"]
    assert {record.child for record in ended} == {"worker 0", "worker 1"}  # type: ignore[attr-defined]


async def _hang(node: Node, *, slot: int) -> None:
    """Have the event loop of the worker of this slot stand still, whoever takes the connections."""
    with contextlib.suppress(TimeoutError):
        while True:
            await asyncio.wait_for(node.ask(f"/hang?{slot}"), 0.5)


async def _returns(value: bool) -> bool:
    return value


async def _are_two(node: Node) -> bool:
    return len(await node.pids()) == 2
