"""Loads beside the measured one: many streams held open, and readers that are slow."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from ibexctl.bench.callers import Callers, Target, build_requests
from ibexctl.bench.lean import Generator, running_generator
from ibexctl.bench.load import Load, Tally

STREAM_SECONDS = 20.0
"""How long each of the open streams lasts, at most; shorter than a generator waits for its last answers."""
GAP_MS = 500
SLOW_EVENT_BYTES = 16_384
SLOW_BYTES_PER_SECOND = 65_536
_EVENT_BYTES = 6


@dataclass
class Companions:
    """Generators that are ready; they ask from `begin` on, and are heard out by `finish`."""

    generators: dict[str, Generator]
    _pool: ThreadPoolExecutor
    _running: "dict[str, Future[Tally]]" = field(default_factory=dict)

    def begin(self) -> None:
        """Start to ask."""
        self._running = {name: self._pool.submit(found.measure) for name, found in self.generators.items()}

    def finish(self) -> dict[str, Tally]:
        """Wait for their last answers."""
        return {name: running.result() for name, running in self._running.items()}


@contextmanager
def own_companions(
    target: Target, callers: Callers | None, *, seconds: float, open_streams: int, slow_readers: int
) -> Iterator[Companions]:
    """So many streams open at any moment of a run, and so many readers slower than their streams come."""
    lasts = min(STREAM_SECONDS, seconds / 3)
    loads = {
        "open streams": (open_streams, f"{lasts * 1e3 / GAP_MS:.0f}x{_EVENT_BYTES}@{GAP_MS}", 0.0),
        "slow readers": (
            slow_readers,
            f"{lasts * SLOW_BYTES_PER_SECOND / SLOW_EVENT_BYTES:.0f}x{SLOW_EVENT_BYTES}@0",
            SLOW_BYTES_PER_SECOND,
        ),
    }
    # inside, so that on the way out the generators end first, and with them the wait for what they say
    with ThreadPoolExecutor(len(loads)) as pool, ExitStack() as stack:
        generators = {}
        for name, (users, pace, read_rate) in loads.items():
            if users:
                load = _load(target, callers, users=users, pace=pace, seconds=seconds, ramp=lasts, read_rate=read_rate)
                generators[name] = stack.enter_context(running_generator(load, lambda _tick: None))
        for generator in generators.values():
            generator.warm()
        yield Companions(generators, pool)


def _load(
    target: Target,
    callers: Callers | None,
    *,
    users: int,
    pace: str,
    seconds: float,
    ramp: float,
    read_rate: float,
) -> Load:
    return Load(
        host=target.host,
        port=target.port,
        is_tls=target.is_tls,
        users=users,
        seconds=seconds,
        warmup_seconds=0.0,
        ramp_seconds=ramp,
        read_bytes_per_second=read_rate,
        requests=build_requests(target, callers, users=users, stream_share=1.0, pace=pace),
    )


def count_completed(tallies: Sequence[Tally]) -> int:
    """Whole answers of all of them."""
    return sum(tally.completed for tally in tallies)
