"""What a scenario is: who is asked, how long, by whom, and what the measured must reach."""

from dataclasses import dataclass
from enum import StrEnum


class Scenario(StrEnum):
    """The benchmarks there are."""

    OVERHEAD = "overhead"
    SATURATION = "saturation"
    STREAM = "stream"
    SOAK = "soak"


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
    think_seconds: float = 0.0
    provider_ms: float = 0.0
    """How long the provider takes for an answer that does not stream."""
    events: int = 64
    gap_ms: float = 5.0
    """Between two events of a stream."""

    @property
    def is_by_locust(self) -> bool:
        """Whether locust makes the load; else our own generator."""
        return self.scenario is Scenario.OVERHEAD

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
            "think_ms": self.think_seconds * 1e3,
            "provider": self._describe_provider(),
            "generator": "locust" if self.is_by_locust else "own, closed loop on keep-alive connections",
        }

    def _describe_provider(self) -> str:
        if self.is_by_locust:
            return f"the ibex sandbox, answers after {self.provider_ms:g} ms, events {self.gap_ms:g} ms apart"
        streams = f"streams of {self.events} events, {self.gap_ms:g} ms apart"
        return f"canned answers after {self.provider_ms:g} ms; {streams}"


_ABOUT: dict[Scenario, dict[str, float]] = {
    Scenario.OVERHEAD: {"seconds": 60, "tokens": 100, "stream_share": 0.2, "provider_ms": 50},
    Scenario.SATURATION: {"seconds": 20, "tokens": 100, "stream_share": 0},
    Scenario.STREAM: {"seconds": 20, "tokens": 100, "stream_share": 1},
    Scenario.SOAK: {"seconds": 600, "tokens": 1000, "stream_share": 0.2, "provider_ms": 20, "think_ms": 50},
}


def make_plan(scenario: Scenario, *, users: int, seconds: float | None, workers: int, tokens: int | None) -> Plan:
    """The scenario with what the caller decided otherwise."""
    about = _ABOUT[scenario]
    measured = about["seconds"] if seconds is None else seconds
    return Plan(
        scenario=scenario,
        users=users,
        seconds=measured,
        warmup_seconds=min(5.0, max(0.5, measured / 4)),
        workers=workers,
        tokens=int(about["tokens"]) if tokens is None else tokens,
        stream_share=about["stream_share"],
        think_seconds=about.get("think_ms", 0.0) / 1e3,
        provider_ms=about.get("provider_ms", 0.0),
    )
