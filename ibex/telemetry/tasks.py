"""Background tasks that are neither collected while they run nor silent when they fail."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

log = logging.getLogger("ibex.tasks")

_running: set[asyncio.Task[Any]] = set()
"""Strong references: the event loop itself keeps only weak ones."""


def spawn(coroutine: Coroutine[Any, Any, T], *, name: str) -> asyncio.Task[T]:
    """Run a coroutine in the background. A failure is logged once, under `name`; cancellation is silent."""
    task = asyncio.get_running_loop().create_task(coroutine, name=name)
    _running.add(task)
    task.add_done_callback(_settle)
    return task


def _settle(task: asyncio.Task[Any]) -> None:
    _running.discard(task)
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("background task failed", exc_info=error, extra={"task": task.get_name()})
