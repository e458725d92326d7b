"""What the generator is told and what it tells: the messages between it and the command that started it."""

import msgspec

from ibexctl.bench.latency import Durations


class Load(msgspec.Struct, kw_only=True):
    """One load: `users` keep-alive connections in a closed loop, each asking again when it has its answer."""

    host: str
    port: int
    is_tls: bool = False
    authority: str = ""
    """A file of certificates that are trusted besides the system's."""
    users: int
    seconds: float
    warmup_seconds: float
    think_seconds: float = 0.0
    """How long a user waits between an answer and its next question."""
    ramp_seconds: float = 0.0
    """Over how long the users' first questions are spread."""
    share: float | None = None
    """At which share of the warm-up's throughput the measurement goes on; None: as quickly as answers come."""
    read_bytes_per_second: float = 0.0
    """How slowly each user reads; 0: as it comes."""
    requests: list[bytes]
    """Whole HTTP requests. User i of n sends the i-th, the (i+n)-th, …, and begins again."""
    notes_turns: bool = False
    """Whether the ids of the turns that were answered whole are to be told."""


class Tick(msgspec.Struct, kw_only=True, tag="tick"):
    """Progress, once a second."""

    second: int
    completed: int
    """Answers within this second."""
    failed: int


class Warm(msgspec.Struct, kw_only=True, tag="warm"):
    """The warm-up is over, and all its answers are in; the word `go` starts the measurement."""

    completed: int
    failed: int
    failures: dict[str, int]
    turns: list[str] = []


class Tally(msgspec.Struct, kw_only=True, tag="tally"):
    """A measurement: every request begun within its time, those answered after its end included."""

    seconds: float
    completed: int = 0
    """Whole answers of status 200."""
    in_time: int = 0
    """Those of them that came before the end: what throughput is counted by."""
    failures: dict[str, int] = {}
    """Requests without one, by reason."""
    events: int = 0
    """Stream events received."""
    cpu_seconds: float = 0.0
    """Processor time of the generator itself."""
    latency: list[tuple[int, int]] = []
    latency_total: float = 0.0
    latency_largest: float = 0.0
    first_byte: list[tuple[int, int]] = []
    """From the request's first byte to the answer body's first, of streams only."""
    first_byte_total: float = 0.0
    first_byte_largest: float = 0.0
    turns: list[str] = []
    """The turns of whole answers, where they were to be noted."""

    @property
    def failed(self) -> int:
        """Requests without a whole answer."""
        return sum(self.failures.values())

    def durations(self) -> Durations:
        """Whole answers."""
        return Durations.from_buckets(self.latency, self.latency_total, self.latency_largest)

    def first_bytes(self) -> Durations:
        """First bytes of streams."""
        return Durations.from_buckets(self.first_byte, self.first_byte_total, self.first_byte_largest)


Message = Tick | Warm | Tally
