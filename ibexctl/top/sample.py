"""What `ibexctl top` shows of a node at one moment: rates over the last seconds, and how things stand."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any
from uuid import UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What clients do. Rates are per second; routes for operators count as nothing."""

    requests: float
    streams: float
    """Streams that ended."""
    in_flight: int
    open_streams: int | None
    """None where the workers do not say."""
    connections: int
    errors: Mapping[str, float]
    """Answers of each status from 400 on that was given."""
    hang_ups: float
    """Streams whose client left."""
    input_tokens: float
    output_tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Milliseconds; None where nothing was measured."""

    p50_ms: float | None
    p99_ms: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Caches:
    """Shares of look-ups that were answered from memory, 0 to 1; None where nothing was looked up."""

    auth: float | None
    directive: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Per second: requests refused by a limit, and questions that Redis did not answer."""

    denied: float
    redis_errors: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Journal:
    """Turns on their way to the stores."""

    pending_turns: int
    oldest_seconds: float
    bytes: int
    max_bytes: int
    dead_letters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What the node says of a store, its provider or its journal."""

    name: str
    status: str
    message: str | None
    latency_ms: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A process of the node; an engine's with those it started."""

    name: str
    pid: int | None
    is_up: bool
    uptime_seconds: float | None
    restarts: int
    cpu: float | None
    """Cores it used, 1 for a whole one; None at the first look and where the system does not say."""
    memory_bytes: int | None
    in_flight: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Leader:
    """An organization's last minute."""

    org_id: UUID
    name: str
    turns: int
    errors: int
    tokens: int
    p50_ms: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One look at a node."""

    at: datetime
    seconds: float
    """Over how long the rates and latencies are."""
    version: str
    env: str
    url: str
    upstream: str
    uptime_seconds: float
    state: str
    """As /ready says: ok, degraded, unhealthy; or unreachable."""
    traffic: Traffic
    latency: Mapping[str, Latency]
    """`request` (a stream's is its length), `overhead`, and `first_byte` of the provider."""
    caches: Caches
    limits: Limits
    journal: Journal
    checks: Sequence[Check]
    processes: Sequence[Process]
    leaders: Sequence[Leader] | None
    """The busiest organizations; None when ClickHouse, or Postgres, does not say."""
    leaders_missing: str | None
    """Why there are none."""

    def as_data(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)
