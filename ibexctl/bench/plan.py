"""What a scenario is: who is asked, how long, by whom, and what the measured must reach."""

from dataclasses import dataclass
from enum import StrEnum

MAX_OPEN_STREAMS = 1000


class Scenario(StrEnum):
    """The benchmarks there are."""

    OVERHEAD = "overhead"
    SATURATION = "saturation"
    STREAM = "stream"
    SOAK = "soak"
    START = "start"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One benchmark, decided."""

    scenario: Scenario
    users: int
    seconds: float
    warmup_seconds: float
    workers: int
    tokens: int
    stream_share: float
    """Share of the requests that stream, 0 to 1."""
    provider_ms: float = 0.0
    """How long the provider takes for an answer that does not stream."""
    events: int = 64
    gap_ms: float = 5.0
    """Between two events of a stream."""
    share: float | None = None
    """Of the throughput at saturation, at which the load goes on; None: as quickly as answers come."""
    open_streams: int = 0
    """Streams held open at once: beside the load of a soak, or to see what one costs in memory."""
    slow_readers: int = 0
    """Of a soak, beside the load too."""
    is_tls: bool = False
    """Whether the provider speaks TLS."""

    @property
    def is_by_locust(self) -> bool:
        """Whether locust makes the load; else our own generator."""
        return self.scenario is Scenario.OVERHEAD

    @property
    def is_compared(self) -> bool:
        """Whether the provider alone and nginx are measured too: at half of their own saturation they say nothing."""
        return self.scenario is not Scenario.SOAK

    @property
    def reference_seconds(self) -> float:
        """How long each of the runs beside the measured one is."""
        return min(self.seconds, 10.0)

    def describe(self) -> dict[str, object]:
        """For the result."""
        return {
            "users": self.users,
            "seconds": self.seconds,
            "warmup_seconds": self.warmup_seconds,
            "workers": self.workers,
            "tokens": self.tokens,
            "stream_share": self.stream_share,
            "share_of_saturation": self.share,
            "open_streams": self.open_streams,
            "slow_readers": self.slow_readers,
            "provider": self._describe_provider(),
            "generator": "locust" if self.is_by_locust else "own, closed loop on keep-alive connections",
        }

    def _describe_provider(self) -> str:
        wire = "over TLS" if self.is_tls else "without TLS"
        if self.is_by_locust:
            return f"the ibex sandbox {wire}, answers after {self.provider_ms:g} ms, events {self.gap_ms:g} ms apart"
        streams = f"streams of {self.events} events, {self.gap_ms:g} ms apart"
        return f"canned answers {wire} after {self.provider_ms:g} ms; {streams}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Defaults:
    """What a scenario is unless the caller decides otherwise."""

    seconds: float
    tokens: int = 100
    stream_share: float = 0.0
    provider_ms: float = 0.0
    share: float | None = None
    open_streams_per_user: float = 0.0
    slow_readers_per_user: float = 0.0


_DEFAULTS = {
    Scenario.OVERHEAD: _Defaults(seconds=60, stream_share=0.2, provider_ms=50),
    Scenario.SATURATION: _Defaults(seconds=20),
    Scenario.STREAM: _Defaults(seconds=20, stream_share=1, open_streams_per_user=10),
    Scenario.SOAK: _Defaults(seconds=600, tokens=1000, share=0.5, open_streams_per_user=10, slow_readers_per_user=0.2),
    Scenario.START: _Defaults(seconds=1, provider_ms=50),
}


def make_plan(
    scenario: Scenario,
    *,
    users: int,
    seconds: float | None,
    workers: int,
    tokens: int | None,
    is_tls: bool = False,
) -> Plan:
    """The scenario with what the caller decided otherwise."""
    defaults = _DEFAULTS[scenario]
    measured = defaults.seconds if seconds is None else seconds
    return Plan(
        scenario=scenario,
        users=users,
        seconds=measured,
        warmup_seconds=min(5.0, max(0.5, measured / 4)),
        workers=workers,
        tokens=defaults.tokens if tokens is None else tokens,
        stream_share=defaults.stream_share,
        provider_ms=defaults.provider_ms,
        share=defaults.share,
        open_streams=min(MAX_OPEN_STREAMS, round(users * defaults.open_streams_per_user)),
        slow_readers=round(users * defaults.slow_readers_per_user),
        is_tls=is_tls,
    )
