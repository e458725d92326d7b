"""What an open stream costs in memory: streams are held open, first a tenth of them and then all."""

from collections.abc import Callable, Sequence

from ibexctl.bench.callers import Callers, Target, build_requests
from ibexctl.bench.lean import running_generator
from ibexctl.bench.load import Load, Tally, Tick
from ibexctl.bench.outcome import Outcome

_PACE = "10x6@500"
"""Five seconds: the last has begun before the first has ended."""
_SECONDS = 3.0
_RAMP_SECONDS = 1.5


def measure_held_streams(
    outcome: Outcome, target: Target, callers: Callers, streams: int, memory: Callable[[], int | None]
) -> None:
    """Fill in what one more open stream costs: the difference of the two peaks, by as many streams.

    The streams end whole, since each must leave its record too.
    """
    few = max(1, streams // 10)
    peaks: list[int] = []
    for count in (few, streams):
        peak, tally = _hold(target, callers, count, memory)
        outcome.warmup_completed += tally.completed
        outcome.failures |= {f"held open: {reason}": number for reason, number in tally.failures.items()}
        peaks += peak
    outcome.held_streams = streams
    if len(peaks) == 2 and streams > few:
        outcome.memory_per_stream_bytes = (peaks[1] - peaks[0]) / (streams - few)


def _hold(
    target: Target, callers: Callers, users: int, memory: Callable[[], int | None]
) -> tuple[Sequence[int], Tally]:
    seen: list[int] = []

    def look(_tick: Tick) -> None:
        now = memory()
        if now is not None:
            seen.append(now)

    load = Load(
        host=target.host,
        port=target.port,
        users=users,
        seconds=_SECONDS,
        warmup_seconds=0.0,
        ramp_seconds=_RAMP_SECONDS,
        requests=build_requests(target, callers, users=users, stream_share=1.0, pace=_PACE),
    )
    with running_generator(load, look) as generator:
        generator.warm()
        tally = generator.measure()
    return [max(seen)] if seen else [], tally
