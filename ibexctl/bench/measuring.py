"""One contender under its load: warmed up, looked at from outside and from within, before and after."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from ibex.errors import OperatorError
from ibexctl.bench.callers import Callers, Target, build_requests
from ibexctl.bench.companions import own_companions
from ibexctl.bench.growth import Growth
from ibexctl.bench.lean import running_generator
from ibexctl.bench.load import Load, Tick
from ibexctl.bench.locust_run import run_locust
from ibexctl.bench.outcome import Outcome
from ibexctl.bench.plan import Plan, Scenario
from ibexctl.bench.processes import sum_cpu, sum_memory
from ibexctl.bench.progress import Progress
from ibexctl.bench.scrape import Counted, Samples, scrape

_HINT = "Ask it once by hand: are address, token, agent and model right, and does its limit leave room?"
_SETTLE_SECONDS = 1.2
"""A node's metrics of its other processes are up to a second old."""


class Measurement:
    """How a plan's load is brought to one target after the other."""

    def __init__(self, plan: Plan, progress: Progress) -> None:
        self._plan = plan
        self._progress = progress

    def run(
        self,
        outcome: Outcome,
        target: Target,
        *,
        seconds: float,
        callers: Callers | None = None,
        pids: Sequence[int] = (),
        metrics_url: str | None = None,
        growth: Growth | None = None,
    ) -> Counted | None:
        """Load the target and fill in the outcome; what it counted itself, where it shows /metrics.

        `pids` are its own processes; `growth` is what looks at them during a soak.
        """
        outcome.memory_idle_bytes = sum_memory(pids)
        watch = _Watch(outcome, pids, self._progress, growth)
        self._progress.begin(f"{outcome.title}: warm-up", self._plan.warmup_seconds)
        with running_generator(self._load(target, callers, seconds), watch.tick) as generator:
            warm = generator.warm()
            if not warm.completed:
                raise OperatorError(f"{outcome.title} answered nothing: {_name(warm.failures)}.", hint=_HINT)
            outcome.warmup_completed += warm.completed
            before = _look(metrics_url)
            self._progress.begin(f"{outcome.title}: measuring", seconds)
            with self._beside(outcome, target, callers, seconds):
                watch.begin()
                if self._plan.is_by_locust:
                    run_locust(outcome, self._plan, target, callers, seconds, self._progress)
                else:
                    outcome.fill(generator.measure())
                watch.end()
        if growth is not None:
            outcome.growth = growth.as_data()
        self._progress.end()
        after = _look(metrics_url)
        return Counted(before, after) if before is not None and after is not None else None

    @contextmanager
    def _beside(self, outcome: Outcome, target: Target, callers: Callers | None, seconds: float) -> Iterator[None]:
        """In a soak, other loads for as long as the measured one; what their clients saw."""
        plan = self._plan
        if plan.scenario is not Scenario.SOAK:
            yield
            return
        with own_companions(
            target, callers, seconds=seconds, open_streams=plan.open_streams, slow_readers=plan.slow_readers
        ) as companions:
            companions.begin()
            yield
            self._progress.begin("the last of the open streams")
            outcome.beside = companions.finish()
        for name, tally in outcome.beside.items():
            outcome.failures |= {f"{name}: {reason}": count for reason, count in tally.failures.items()}

    def _load(self, target: Target, callers: Callers | None, seconds: float) -> Load:
        plan = self._plan
        requests = build_requests(target, callers, users=plan.users, stream_share=plan.stream_share)
        return Load(
            host=target.host,
            port=target.port,
            is_tls=target.is_tls,
            users=plan.users,
            seconds=seconds,
            warmup_seconds=plan.warmup_seconds,
            share=plan.share,
            authority=target.authority_file,
            ramp_seconds=plan.events * plan.gap_ms / 1e3 if plan.stream_share == 1 else 0.0,
            requests=requests,
        )


class _Watch:
    """What is noted of a contender's processes before, each second of, and after a measurement."""

    def __init__(self, outcome: Outcome, pids: Sequence[int], progress: Progress, growth: Growth | None) -> None:
        self._outcome = outcome
        self._pids = pids
        self._progress = progress
        self._growth = growth
        self._is_measuring = False
        self._cpu_before: float | None = None

    def tick(self, tick: Tick) -> None:
        """A second has passed."""
        self._progress.show(tick.second, f"{tick.completed:,} answers a second")
        self._look_at_memory()
        if self._is_measuring:
            self._outcome.timeline.append(tick.completed)
            if self._growth is not None:
                self._growth.look(tick.second)

    def begin(self) -> None:
        """The measurement starts."""
        self._is_measuring = True
        self._cpu_before = sum_cpu(self._pids)

    def end(self) -> None:
        """The measurement is over."""
        after = sum_cpu(self._pids)
        if self._cpu_before is not None and after is not None:
            self._outcome.cpu_seconds = after - self._cpu_before
        self._look_at_memory()

    def _look_at_memory(self) -> None:
        now = sum_memory(self._pids)
        if now is not None:
            self._outcome.memory_peak_bytes = max(now, self._outcome.memory_peak_bytes or 0)


def _look(metrics_url: str | None) -> Samples | None:
    if metrics_url is None:
        return None
    time.sleep(_SETTLE_SECONDS)
    return scrape(metrics_url)


def _name(failures: Mapping[str, int]) -> str:
    return max(failures, key=lambda reason: failures[reason]) if failures else "not once"
