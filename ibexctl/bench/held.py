"""What an open stream costs in memory: streams are held open, first a tenth of them and then all."""

from collections.abc import Callable, Sequence

from ibexctl.bench.callers import Callers, Target, build_requests
from ibexctl.bench.lean import running_generator
from ibexctl.bench.load import Load, Tally, Tick
from ibexctl.bench.outcome import Outcome

LONGEST_SECONDS = 2.5
"""For how long each stream is held: long enough for a thousand to begin meanwhile."""
_EVENTS = 6


def measure_held_streams(
    outcome: Outcome,
    target: Target,
    callers: Callers,
    memory: Callable[[], int | None],
    *,
    streams: int,
    seconds: float = LONGEST_SECONDS,
) -> None:
    """Fill in what one more open stream costs: the difference of the two peaks, by as many streams.

    The streams last so many seconds and end whole, since each must leave its record too.
    """
    few = max(1, streams // 10)
    peaks: list[int] = []
    for count in (few, streams):
        peak, tally = _hold(target, callers, memory, users=count, lasts=seconds)
        outcome.warmup_completed += tally.completed
        outcome.failures |= {f"held open: {reason}": number for reason, number in tally.failures.items()}
        peaks += peak
    outcome.held_streams = streams
    if len(peaks) == 2 and streams > few:
        outcome.memory_per_stream_bytes = (peaks[1] - peaks[0]) / (streams - few)


def _hold(
    target: Target, callers: Callers, memory: Callable[[], int | None], *, users: int, lasts: float
) -> tuple[Sequence[int], Tally]:
    seen: list[int] = []

    def look(_tick: Tick) -> None:
        now = memory()
        if now is not None:
            seen.append(now)

    pace = f"{_EVENTS}x6@{lasts * 1e3 / (_EVENTS - 1):.0f}"
    load = Load(
        host=target.host,
        port=target.port,
        users=users,
        seconds=lasts * 0.8,  # the last look, before the first stream ends
        warmup_seconds=0.0,
        ramp_seconds=lasts * 0.4,
        requests=build_requests(target, callers, users=users, stream_share=1.0, pace=pace),
    )
    with running_generator(load, look) as generator:
        generator.warm()
        tally = generator.measure()
    return [max(seen)] if seen else [], tally
