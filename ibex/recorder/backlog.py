"""How much is waiting: turns, and the age of the oldest, counted from the segments themselves."""

import time
from array import array
from bisect import bisect_left
from collections.abc import Sequence

from ibex.domain.turns import decode_turn
from ibex.recorder.delivery import Delivery, slowest_position
from ibex.recorder.spool import FIRST_POSITION, Spool

_COUNT_BYTES = 8 << 20
"""Read at most this much at a time for the sake of counting; a larger backlog is counted in several rounds."""


class Backlog:
    """Turns that some sink has not yet taken."""

    def __init__(self, spool: Spool, deliveries: Sequence[Delivery]) -> None:
        self._spool = spool
        self._deliveries = deliveries
        self._starts: dict[str, array[int]] = {}
        self._counted: dict[str, int] = {}
        self.turns = 0
        self.oldest_seconds = 0.0

    def measure(self) -> None:
        """Count anew what has been added since the last time."""
        budget = _COUNT_BYTES
        turns, oldest = 0, None
        for segment in self._spool.segments:
            position = slowest_position(self._deliveries, segment)
            budget -= self._count(segment, position, budget)
            starts = self._starts[segment]
            first = bisect_left(starts, position)
            turns += len(starts) - first
            if first < len(starts):
                completed_at = self._completed_at(segment, starts[first])
                oldest = completed_at if oldest is None or completed_at < oldest else oldest
        self.turns = turns
        self.oldest_seconds = 0.0 if oldest is None else max(0.0, time.time() - oldest)

    def forget(self, segment: str) -> None:
        """The segment is gone."""
        self._starts.pop(segment, None)
        self._counted.pop(segment, None)

    def _count(self, segment: str, position: int, budget: int) -> int:
        """Learn where the records of a segment begin, from `position` on; bytes read."""
        starts = self._starts.setdefault(segment, array("Q"))
        begin = max(self._counted.get(segment, FIRST_POSITION), position)
        portion = self._spool.read(segment, begin, limit=budget) if budget > 0 else None
        if portion is None:
            return 0
        starts.extend(record.start for record in portion.records)
        self._counted[segment] = portion.place.stop
        return portion.place.stop - begin

    def _completed_at(self, segment: str, start: int) -> float:
        """When the turn of the record at `start` ended (Unix s); a record that is no turn counts as new."""
        portion = self._spool.read(segment, start, limit=1)
        try:
            return decode_turn(portion.records[0].payload).completed_at / 1e6 if portion else time.time()
        except (ValueError, IndexError):
            return time.time()
