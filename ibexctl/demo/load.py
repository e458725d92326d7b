"""A load beside a demonstration: the benchmark's generator, run while the demonstration breaks things."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from ibexctl.bench.callers import Callers, Target, build_requests
from ibexctl.bench.lean import Generator, running_generator
from ibexctl.bench.load import Load, Tally, Warm

WARMUP_SECONDS = 0.5
THINK_SECONDS = 0.01


class Clients:
    """Clients that ask on and on, and note each turn whose end they have seen."""

    def __init__(self, generator: Generator, warm: Warm, measuring: "Future[Tally]") -> None:
        self._generator = generator
        self._warm = warm
        self._measuring = measuring

    def finish(self) -> tuple[Tally, list[str]]:
        """Wait until they have all they asked for: what they counted, and every turn they saw whole."""
        tally = self._measuring.result()
        return tally, self._warm.turns + tally.turns


@contextmanager
def asking_clients(
    address: str, callers: Callers, *, users: int, seconds: float, stream_share: float
) -> Iterator[Clients]:
    """So many clients that ask for so long, and pause for a moment between two questions."""
    target = Target.parse(address)
    load = Load(
        host=target.host,
        port=target.port,
        users=users,
        seconds=seconds,
        warmup_seconds=WARMUP_SECONDS,
        think_seconds=THINK_SECONDS,
        requests=build_requests(target, callers, users=users, stream_share=stream_share),
        notes_turns=True,
    )
    # inside, so that on the way out the generator ends first, and with it the wait for what it says
    with ThreadPoolExecutor(1) as waiting, running_generator(load, lambda _tick: None) as generator:
        warm = generator.warm()
        yield Clients(generator, warm, waiting.submit(generator.measure))
