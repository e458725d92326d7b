"""Background tasks: kept alive, and heard when they fail."""

import asyncio
import gc
import logging

import pytest

from ibex.telemetry import spawn


async def test_a_task_nobody_holds_is_not_collected() -> None:
    done = asyncio.Event()

    async def work() -> None:
        await asyncio.sleep(0.01)
        done.set()

    spawn(work(), name="work")
    gc.collect()

    async with asyncio.timeout(5):
        await done.wait()


async def test_a_failure_is_logged_once_under_its_name(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise ValueError("secret")

    with caplog.at_level(logging.ERROR):
        with pytest.raises(ValueError, match="secret"):
            await spawn(fail(), name="doomed")
        await asyncio.sleep(0)

    assert [(record.message, record.task) for record in caplog.records] == [("background task failed", "doomed")]


async def test_a_cancelled_task_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    task = spawn(asyncio.sleep(60), name="sleeper")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0)

    assert not caplog.records
