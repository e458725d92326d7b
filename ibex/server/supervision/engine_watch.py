"""Watches one embedded engine, and starts it again at the same address when it ends."""

import asyncio
import contextlib
import logging
import time

from ibex.engines.engine import Engine
from ibex.errors import OperatorError
from ibex.server.supervision.keeping import Backoff
from ibex.telemetry import spawn

log = logging.getLogger("ibex.supervisor")


class EngineWatch:
    """From the moment at which an engine serves until `stop`, which leaves the engine itself running."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.is_up = True
        self.restarts = 0
        self.started = time.monotonic()
        self._task = spawn(self._watch(), name=f"watch {engine.name}")

    async def stop(self) -> None:
        """Watch no more."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _watch(self) -> None:
        backoff = Backoff()
        while True:
            code = await self.engine.wait()
            self.is_up = False
            lifetime = time.monotonic() - self.started
            log.error("engine ended; starting it again", extra={"engine": self.engine.name, "exit_code": code})
            while not self.is_up:
                await asyncio.sleep(backoff.after(lifetime))
                await self._restart()
                lifetime = 0.0

    async def _restart(self) -> None:
        self.restarts += 1
        try:
            await self.engine.start()
        except OperatorError as error:
            log.error("engine did not start", extra={"engine": self.engine.name, "reason": error.message})
        else:
            self.is_up, self.started = True, time.monotonic()
            log.info("engine is back", extra={"engine": self.engine.name, "pid": self.engine.pid})
