"""Keeps a program running: a child that ends is started again, with back-off."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from ibex.errors import OperatorError
from ibex.server.supervision.children import Child
from ibex.telemetry import spawn

log = logging.getLogger("ibex.supervisor")

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS, STEADY_SECONDS = 0.1, 5.0, 30.0


class Backoff:
    """The waits between restarts: doubling from 0.1 s to 5 s, from the start again after a life of 30 s."""

    def __init__(self) -> None:
        self._wait = FIRST_WAIT_SECONDS

    def after(self, lifetime: float) -> float:
        """How long to wait after a life of so many seconds."""
        if lifetime >= STEADY_SECONDS:
            self._wait = FIRST_WAIT_SECONDS
        wait, self._wait = self._wait, min(self._wait * 2, LONGEST_WAIT_SECONDS)
        return wait


class Keeper:
    """Keeps one program running: a child that ends is started again.

    `on_up` is called when a child begins to serve, `on_down` when it ended unasked; a replacement has no `on_down`.
    """

    def __init__(
        self,
        name: str,
        launch: Callable[[], Awaitable[Child]],
        *,
        on_up: Callable[[], None] = lambda: None,
        on_down: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.child: Child | None = None
        self.restarts = 0
        self._launch = launch
        self._on_up = on_up
        self._on_down = on_down
        self._watch: asyncio.Task[None] | None = None
        self._retiring: dict[Child, asyncio.Task[None]] = {}

    @property
    def children(self) -> list[Child]:
        """Its processes: one, and those it is just replacing."""
        return [child for child in (self.child, *self._retiring) if child is not None]

    @property
    def is_up(self) -> bool:
        """Whether it serves."""
        return self.child is not None and self.child.is_ready and self.child.is_alive

    async def start(self) -> None:
        """Start it for the first time; raises OperatorError when it does not become ready."""
        self.child = await self._launch()
        if not await self.child.wait_ready():
            await self.child.kill()
            raise self.child.explain_failure()
        self._on_up()
        self._watch = spawn(self._keep(self.child), name=f"keep {self.name}")

    async def replace(self, drain_seconds: float) -> OperatorError | None:
        """Start a successor; when it is ready the old one drains beside it, which nobody waits for.

        An error: it did not start, and the old one stays.
        """
        successor = await self._launch()
        try:
            is_ready = await successor.wait_ready()
        except asyncio.CancelledError:
            await successor.kill()
            raise
        if not is_ready:
            await successor.kill()
            return successor.explain_failure()
        old = self.child
        await self.stop_watching()
        self.child = successor
        self._on_up()
        self._watch = spawn(self._keep(successor), name=f"keep {self.name}")
        if old is not None:
            self._retiring[old] = spawn(self._retire(old, drain_seconds), name=f"retire {self.name}")
        return None

    async def stop(self, drain_seconds: float) -> None:
        """Stop it for good."""
        await self.stop_watching()
        children, retirements = self.children, list(self._retiring.values())
        for retirement in retirements:
            retirement.cancel()
        await asyncio.gather(*retirements, return_exceptions=True)
        await asyncio.gather(*(child.stop(drain_seconds) for child in children))

    def hurry(self) -> None:
        """Cut short the drain that is under way."""
        for child in self.children:
            child.hurry()

    async def stop_watching(self) -> None:
        """Start nothing again from now on."""
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch

    async def _retire(self, child: Child, drain_seconds: float) -> None:
        try:
            await child.stop(drain_seconds, has_successor=True)
        finally:
            del self._retiring[child]

    async def _keep(self, child: Child) -> None:
        backoff = Backoff()
        while True:
            code = await child.wait()
            self._on_down()
            facts = {"child": self.name, "pid": child.pid, "exit_code": code}
            child = await self._relaunch(backoff, child.lifetime, facts)
            if await child.wait_ready():
                log.info("process is back", extra={"child": self.name, "pid": child.pid})
                self._on_up()
            else:
                await child.kill()

    async def _relaunch(self, backoff: Backoff, lifetime: float, facts: dict[str, Any]) -> Child:
        while True:
            wait = backoff.after(lifetime)
            log.error("process ended; starting it again", extra={**facts, "restart_in_seconds": wait})
            await asyncio.sleep(wait)
            self.restarts += 1
            try:
                self.child = await self._launch()
            except OSError as error:  # no process or file to be had: the next wait is longer
                lifetime, facts = 0.0, {"child": self.name, "reason": error.strerror}
            else:
                return self.child
