"""A child's orders to end: from its supervisor, from a signal, or from the supervisor's death."""

import asyncio
import math
import signal
from collections.abc import Coroutine

from ibex.server.control import Control

LAST_RESORT_SECONDS = 10
"""How long after its time to drain a child that hangs is ended by the kernel."""


class Lifeline:
    """Waits for the first order to end, and lets a later, shorter one cut the drain short."""

    def __init__(self, control: Control, drain_seconds: float) -> None:
        self._ordered = asyncio.Event()
        self._seconds = drain_seconds
        self._patience: asyncio.Timeout | None = None
        control.on_drain = self.order
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.order, None)

    def order(self, seconds: float | None) -> None:
        """End within so many seconds; None: within the settings' time."""
        if seconds is not None:
            self._seconds = min(self._seconds, seconds)
        if not self._ordered.is_set():
            self._ordered.set()
            # an event loop that hangs cannot end itself; SIGALRM without a handler does
            signal.alarm(math.ceil(self._seconds) + LAST_RESORT_SECONDS)
        if self._patience is not None and not self._patience.expired():
            self._patience.reschedule(asyncio.get_running_loop().time() + self._seconds)

    async def ended(self) -> float:
        """Wait for the order; answers the seconds to drain."""
        await self._ordered.wait()
        return self._seconds

    @property
    def event(self) -> asyncio.Event:
        """Set by the order."""
        return self._ordered

    async def within(self, drain: Coroutine[None, None, None]) -> bool:
        """Drain, for no longer than the orders allow; whether it was done in time."""
        try:
            async with asyncio.timeout(self._seconds) as self._patience:
                await drain
        except TimeoutError:
            return False
        finally:
            self._patience = None
        return True
