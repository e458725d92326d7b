"""Ends a child that lives and says nothing: its event loop stands still, and nobody else would notice."""

import asyncio
import logging
from collections.abc import Callable, Iterable

from ibex.server.control import REPORT_SECONDS
from ibex.server.supervision.children import Child
from ibex.telemetry import spawn

log = logging.getLogger("ibex.supervisor")


class Watchdog:
    """Ends, from `start` to `stop`, each of the `children` that has not reported for `seconds`; 0: none.

    It counts its own beats and not the clock's seconds: while this process does not run, no child's silence grows.
    """

    def __init__(self, children: Callable[[], Iterable[Child]], seconds: Callable[[], float]) -> None:
        self._children = children
        self._seconds = seconds
        self._silence: dict[Child, tuple[int, int]] = {}
        """How many messages each had sent when it was last heard, and how many beats ago that was."""
        self._ending: set[Child] = set()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to watch."""
        self._task = spawn(self._watch(), name="watchdog")

    async def stop(self) -> None:
        """Watch no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            limit = self._seconds()
            silent = [child for child, seconds in self._listen() if 0 < limit <= seconds and child not in self._ending]
            for child in silent:
                facts = {"child": child.name, "pid": child.pid, "seconds": limit}
                log.error("process says nothing; ending it", extra=facts)
                self._ending.add(child)
                _ = spawn(self._end(child), name=f"end {child.name}")

    async def _end(self, child: Child) -> None:
        """End one; it may take for ever, when the kernel itself waits for a disk, and the others are watched on."""
        try:
            await child.abort()
        finally:
            self._ending.discard(child)

    def _listen(self) -> Iterable[tuple[Child, float]]:
        """Each child that serves, and for how long it has been silent (s)."""
        former, self._silence = self._silence, {}
        for child in self._children():
            if child.is_ready and child.is_alive:
                heard, beats = former.get(child, (-1, 0))
                beats = beats + 1 if child.heard == heard else 0
                self._silence[child] = child.heard, beats
                yield child, beats * REPORT_SECONDS
