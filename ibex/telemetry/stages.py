"""The stages of a request, and the one clock that times them."""

from enum import StrEnum
from time import perf_counter


class Stage(StrEnum):
    """What a request goes through, in this order."""

    AUTHENTICATION = "authentication"
    RATE_LIMIT = "rate_limit"
    DIRECTIVE = "directive"
    READ = "read"
    WEAVE = "weave"
    PROVIDER = "provider"
    RELAY = "relay"


class StageClock:
    """When each stage of one request ended (monotonic seconds). Spans, histograms and trace columns all read it.

    It starts at the request's first byte, as the socket's protocol saw it, so that time spent in a queue counts.
    """

    __slots__ = ("_last", "first_byte_out", "spent", "started", "wall_started")

    def __init__(self, started: float, wall_started: float) -> None:
        self.started = started
        self.wall_started = wall_started
        """Unix seconds of the same moment."""
        self.first_byte_out: float | None = None
        self.spent: dict[Stage, tuple[float, float]] = {}
        """From and to, by stage."""
        self._last = started

    def finish(self, stage: Stage) -> None:
        """End a stage: it began when the one before it ended."""
        now = perf_counter()
        self.spent[stage] = (self._last, now)
        self._last = now

    def seconds(self, stage: Stage) -> float:
        """How long a stage took; 0 for one that was not reached."""
        begun, ended = self.spent.get(stage, (0.0, 0.0))
        return ended - begun

    def elapsed(self) -> float:
        """Seconds since the first byte came in."""
        return perf_counter() - self.started

    def wall_now(self) -> float:
        """Unix seconds now, by the monotonic clock: a step of the wall clock never makes a latency negative."""
        return self.wall_started + self.elapsed()
