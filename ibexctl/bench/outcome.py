"""One contender's run: what its clients saw, what its processes used, and how that is told."""

from dataclasses import dataclass, field
from typing import Any

from ibexctl.bench.latency import Durations
from ibexctl.bench.load import Tally

DIRECT, NGINX, IBEX = "direct", "nginx", "ibex"


@dataclass(kw_only=True)
class Outcome:
    """What one contender did under the load."""

    name: str
    title: str
    skipped: str | None = None
    """Why it was not run."""
    seconds: float = 0.0
    completed: int = 0
    in_time: int = 0
    warmup_completed: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    latency: Durations = field(default_factory=Durations)
    first_byte: Durations = field(default_factory=Durations)
    events: int = 0
    timeline: list[int] = field(default_factory=list)
    """Answers in each second."""
    cpu_seconds: float | None = None
    """Processor time of the contender's own processes."""
    generator_cpu_seconds: float | None = None
    memory_idle_bytes: int | None = None
    memory_peak_bytes: int | None = None
    held_streams: int = 0
    """How many streams were held open to see what one costs in memory."""
    memory_per_stream_bytes: float | None = None
    beside: dict[str, Tally] = field(default_factory=dict)
    """What was loaded beside, by name: streams held open, slow readers."""
    growth: dict[str, Any] = field(default_factory=dict)
    """What the server's processes held over the run, by process (`Growth.as_data`)."""

    upstream_connections: int | None = None
    """How many connections to the provider there were, where that was looked at."""

    def fill(self, tally: Tally) -> None:
        """Take what the lean generator's clients saw."""
        self.seconds = tally.seconds
        self.completed = tally.completed
        self.in_time = tally.in_time
        self.failures |= tally.failures
        self.events = tally.events
        self.latency = tally.durations()
        self.first_byte = tally.first_bytes()
        self.generator_cpu_seconds = tally.cpu_seconds

    @property
    def answered(self) -> int:
        """Every whole answer, those of the warm-up and of what was loaded beside included: each must have a record."""
        return self.warmup_completed + self.completed + sum(tally.completed for tally in self.beside.values())

    @property
    def throughput(self) -> float:
        """Answers a second."""
        return self.in_time / self.seconds if self.seconds else 0.0

    @property
    def failure_share(self) -> float:
        """Failed requests by all."""
        failed = sum(self.failures.values())
        return failed / (failed + self.completed) if failed + self.completed else 1.0

    @property
    def cpu_us_per_request(self) -> float | None:
        """Processor time (µs) of the contender by answer."""
        return None if self.cpu_seconds is None or not self.completed else self.cpu_seconds / self.completed * 1e6

    @property
    def cpu_us_per_event(self) -> float | None:
        """Processor time (µs) of the contender by stream event, the requests' own work included."""
        return None if self.cpu_seconds is None or not self.events else self.cpu_seconds / self.events * 1e6

    @property
    def cpu_share(self) -> float | None:
        """How much of one core it used: near 1 (by process), it was at its end; far below, the load was."""
        return None if self.cpu_seconds is None or not self.seconds else self.cpu_seconds / self.seconds

    def as_data(self) -> dict[str, Any]:
        """For `--json`."""
        if self.skipped is not None:
            return {"name": self.name, "title": self.title, "skipped": self.skipped}
        return {
            "name": self.name,
            "title": self.title,
            "skipped": None,
            "seconds": self.seconds,
            "completed": self.completed,
            "failures": self.failures,
            "throughput": round(self.throughput, 1),
            "latency_ms": self.latency.summary(),
            "first_byte_ms": self.first_byte.summary() if self.first_byte.count else None,
            "events": self.events,
            "events_per_second": round(self.events / self.seconds, 1) if self.seconds else 0.0,
            "cpu_us_per_request": _round(self.cpu_us_per_request, 1),
            "cpu_us_per_event": _round(self.cpu_us_per_event, 1),
            "cpu_share": _round(self.cpu_share, 3),
            "generator_cpu_share": _round(
                self.generator_cpu_seconds / self.seconds if self.generator_cpu_seconds and self.seconds else None, 3
            ),
            "memory_idle_bytes": self.memory_idle_bytes,
            "memory_peak_bytes": self.memory_peak_bytes,
            "held_streams": self.held_streams,
            "memory_per_stream_bytes": _round(self.memory_per_stream_bytes, 0),
            "beside": {name: _describe_beside(tally) for name, tally in self.beside.items()},
            "growth": self.growth,
            "upstream_connections": self.upstream_connections,
            "timeline": self.timeline,
            "distribution": self.latency.distribution(),
        }


def _describe_beside(tally: Tally) -> dict[str, Any]:
    return {
        "completed": tally.completed,
        "failures": tally.failures,
        "events": tally.events,
        "first_byte_ms": tally.first_bytes().summary() if tally.completed else None,
    }


def _round(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
