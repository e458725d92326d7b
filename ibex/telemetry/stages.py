"""The stages of a request, and the one clock that times them."""

from collections.abc import Iterator
from enum import IntEnum
from time import perf_counter


class Stage(IntEnum):
    """What a request goes through, in this order. Integers, since a clock's marks are a list by stage."""

    AUTHENTICATION = 0
    RATE_LIMIT = 1
    DIRECTIVE = 2
    READ = 3
    WEAVE = 4
    PROVIDER = 5
    RELAY = 6

    @property
    def label(self) -> str:
        """The stage's name in a span."""
        return self.name.lower()


class StageClock:
    """When each stage of one request ended (monotonic seconds). Spans, histograms and trace columns all read it.

    It starts at the request's first byte, as the socket's protocol saw it, so that time spent in a queue counts.
    """

    __slots__ = ("_begun", "_ended", "_last", "first_byte_out", "started", "wall_started")

    def __init__(self, started: float, wall_started: float) -> None:
        self.started = started
        self.wall_started = wall_started
        """Unix seconds of the same moment."""
        self.first_byte_out: float | None = None
        self._begun = [0.0] * 7
        self._ended = [0.0] * 7
        self._last = started

    def finish(self, stage: Stage) -> None:
        """End a stage: it began when the one before it ended."""
        self._begun[stage] = self._last
        self._last = self._ended[stage] = perf_counter()

    def seconds(self, stage: Stage) -> float:
        """How long a stage took; 0 for one that was not reached."""
        return self._ended[stage] - self._begun[stage]

    def ended(self, stage: Stage) -> float:
        """When a stage ended (monotonic seconds); 0 for one that was not reached."""
        return self._ended[stage]

    def spans(self) -> Iterator[tuple[Stage, float, float]]:
        """Every stage that was reached: from when to when."""
        return ((stage, self._begun[stage], self._ended[stage]) for stage in Stage if self._ended[stage])

    def elapsed(self) -> float:
        """Seconds since the first byte came in."""
        return perf_counter() - self.started

    def wall_now(self) -> float:
        """Unix seconds now, by the monotonic clock: a step of the wall clock never makes a latency negative."""
        return self.wall_started + self.elapsed()
