"""The stop of a node: which part of it is under way, what it cut short, and what it leaves for the next start."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from ibex.server.messages import Unfinished
from ibex.server.supervision.children import Child
from ibex.server.supervision.status import StopStatus
from ibex.telemetry import spawn

log = logging.getLogger("ibex.supervisor")

PROGRESS_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StopResult:
    """How a node's stop went."""

    seconds: float
    is_hurried: bool
    """Whether a second order cut it short."""
    unfinished: tuple[tuple[str, Unfinished], ...] = ()
    """What was cut, by process."""
    undelivered_turns: int | None = None
    """Turns that wait in the journal for the next start; None: no recorder has said."""

    @property
    def is_clean(self) -> bool:
        """Whether every request was answered to its end."""
        return not self.unfinished

    @property
    def facts(self) -> dict[str, Any]:
        """The same for the log."""
        cut = [unfinished for _, unfinished in self.unfinished]
        return {
            "seconds": round(self.seconds, 3),
            "cut_requests": sum(unfinished.requests for unfinished in cut),
            "cut_streams": sum(unfinished.streams for unfinished in cut),
            "undelivered_turns": self.undelivered_turns,
        }


class Shutdown:
    """Follows the one stop of a node, from the order to the end."""

    def __init__(self, in_flight: Callable[[], int]) -> None:
        """`in_flight` says how many requests the node's workers have not answered."""
        self._in_flight = in_flight
        self._began = 0.0
        self._status: StopStatus | None = None
        self._part_ends = 0.0
        self._is_ordered = asyncio.Event()
        self._is_hurried = asyncio.Event()
        self._unfinished: list[tuple[str, Unfinished]] = []

    @property
    def is_ordered(self) -> bool:
        """Whether the node was told to stop."""
        return self._is_ordered.is_set()

    @property
    def status(self) -> StopStatus | None:
        """Where it is; None while the node serves."""
        if self._status is not None:
            self._status.seconds_left = max(0.0, self._part_ends - time.monotonic())
        return self._status

    def order(self) -> None:
        """The node is to stop; ordered again, in a hurry."""
        if self.is_ordered:
            self._is_hurried.set()
            log.warning("hurrying", extra={"in_flight": self._in_flight()})
        else:
            self._began = time.monotonic()
            self._is_ordered.set()

    async def ordered(self) -> None:
        """Wait for the order."""
        await self._is_ordered.wait()

    async def part(self, doing: str, seconds: float, work: Awaitable[object]) -> None:
        """Do a part of the stop that bounds itself to about so many seconds, and tell how it goes."""
        self._status = StopStatus(doing=doing, seconds_left=seconds)
        self._part_ends = time.monotonic() + seconds
        progress = spawn(self._tell(self._status), name="progress of the stop")
        try:
            await work
        finally:
            progress.cancel()

    async def pause(self, seconds: float) -> None:
        """Wait, unless there is a hurry."""
        try:
            async with asyncio.timeout(seconds):
                await self._is_hurried.wait()
        except TimeoutError:
            pass

    def note_end(self, child: Child) -> None:
        """A child has ended; during the stop nothing comes in its place."""
        unfinished = child.unfinished
        if self.is_ordered and unfinished is not None:
            self._unfinished.append((child.name, unfinished))

    def result(self, undelivered_turns: int | None) -> StopResult:
        """How it went."""
        return StopResult(
            seconds=time.monotonic() - self._began,
            is_hurried=self._is_hurried.is_set(),
            unfinished=tuple(sorted(self._unfinished)),
            undelivered_turns=undelivered_turns,
        )

    async def _tell(self, part: StopStatus) -> None:
        while True:
            left = max(0.0, self._part_ends - time.monotonic())
            log.info(part.doing, extra={"in_flight": self._in_flight(), "seconds_left": round(left, 1)})
            await asyncio.sleep(PROGRESS_SECONDS)
