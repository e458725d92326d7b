"""The parts of a benchmark: how growth is told, how a load is paced, and which options contradict each other."""

import os
from datetime import UTC, datetime

import pytest

from ibex.server.supervision.status import describe_process
from ibexctl.bench.callers import Target, build_requests
from ibexctl.bench.certificates import own_certificates
from ibexctl.bench.contest import Result
from ibexctl.bench.growth import LEAST_SECONDS, Growth, slope
from ibexctl.bench.lean import running_generator, running_provider
from ibexctl.bench.load import Load
from ibexctl.bench.outcome import Outcome
from ibexctl.bench.plan import Scenario, make_plan
from ibexctl.bench.processes import Cores, count_connections
from ibexctl.bench.responder import Answers, Stream
from ibexctl.bench.starting import burst
from ibexctl.bench.verdict import judge


def test_a_slope_is_that_of_the_nearest_line() -> None:
    assert slope([(second, 7 + 0.5 * second) for second in range(100)]) == pytest.approx(0.5)
    assert slope([(0, 5), (1, 7), (2, 5)]) == pytest.approx(0)
    assert slope([(3, 5)]) == slope([]) == 0


def test_growth_is_told_of_a_long_run_and_of_watched_processes_alone() -> None:
    leak = 0

    def processes() -> list:
        nonlocal leak
        leak += 1
        found = [
            describe_process(name, os.getpid(), True, 1.0, facts={"tasks": leak}) for name in ("worker 0", "sandbox")
        ]
        return [*found, describe_process("worker 1", None, False, 0.0)]

    growth = Growth(processes, LEAST_SECONDS)
    for second in range(int(LEAST_SECONDS)):
        growth.look(second)
    (held,) = growth.as_data().values()
    assert held["tasks"]["per_minute"] == pytest.approx(60)
    assert held["tasks"]["first"] == 1
    assert held["descriptors"]["last"] > 2
    assert len(held["memory_timeline"]) == LEAST_SECONDS


def test_a_load_is_paced_by_its_warm_up_and_a_slow_reader_takes_its_time() -> None:
    with running_provider("ibexctl.bench.responder") as port:
        target = Target("127.0.0.1", port)
        common = {"host": target.host, "port": port, "users": 4, "seconds": 0.8}
        requests = build_requests(target, None, users=4, stream_share=0)
        with running_generator(
            Load(**common, warmup_seconds=0.4, share=0.1, requests=requests), lambda _: None
        ) as paced:
            warm = paced.warm()
            tally = paced.measure()
        assert count_connections(port) <= 4
        requests = build_requests(target, None, users=4, stream_share=1, pace="8x16384@0")
        slow = Load(**common, warmup_seconds=0.0, read_bytes_per_second=131_072, requests=requests)
        with running_generator(slow, lambda _: None) as generator:
            generator.warm()
            read = generator.measure()
    assert tally.in_time / 0.8 == pytest.approx(0.1 * warm.completed / 0.4, rel=0.3)
    assert read.failed == 0
    assert read.events == 9 * read.completed > 0
    assert read.latency_total / read.completed > 0.5


def test_a_burst_asks_once_for_each_user_and_counts_what_it_takes_upstream() -> None:
    with running_provider("ibexctl.bench.responder", "--delay-ms", "50") as port:
        target, outcome = Target("127.0.0.1", port), Outcome(name="direct", title="provider alone")
        burst(outcome, target, None, 8, target)
    assert (outcome.completed, outcome.failures, outcome.upstream_connections) == (8, {}, 8)
    assert outcome.latency.quantile(0.5) > 0.05


def test_the_sandbox_speaks_tls_under_the_authority_of_the_run() -> None:
    with own_certificates() as made, running_provider("ibex.sandbox", "--certificate", str(made.server)) as port:
        target = Target("127.0.0.1", port, is_tls=True, authority_file=str(made.authority))
        outcome = Outcome(name="direct", title="provider alone")
        burst(outcome, target, None, 2, target)
        assert (outcome.completed, outcome.failures) == (2, {})


def test_starts_are_judged_by_what_people_wait_for() -> None:
    plan = make_plan(Scenario.START, users=8, seconds=None, workers=1, tokens=None)
    outcome = Outcome(name="ibex", title="ibex, just started", completed=8)
    starts = {"help": 0.2, "first": 9.0, "ready": 1.6}
    result = Result(plan=plan, at=datetime.now(UTC), machine={}, cores=Cores(), outcomes=[outcome], starts=starts)
    verdicts = {check.name: check.is_passed for check in judge(result)}
    assert verdicts == {"failed requests": True, "ibexctl --help": True, "serve ready, stores running": False}


def test_a_request_can_ask_for_another_stream() -> None:
    answers = Answers(b"", 0.0, Stream([b"usual"], 0.005))
    assert answers.stream_for(b'{"stream": true}') is answers.stream
    asked = answers.stream_for(b'{"metadata": {"pace": "12x100@500"}}')
    assert (len(asked.writes), asked.gap) == (12, 0.5)
    assert all(b"x" * 100 in write for write in asked.writes[1:10])
    assert answers.stream_for(b'{"metadata": {"pace": "12x100@500"}}') is asked


def test_a_soak_is_half_of_saturation_beside_a_thousand_streams() -> None:
    plan = make_plan(Scenario.SOAK, users=100, seconds=None, workers=1, tokens=None)
    assert (plan.seconds, plan.share, plan.open_streams, plan.slow_readers, plan.tokens) == (600, 0.5, 1000, 20, 1000)


@pytest.mark.parametrize(
    "words",
    [
        ("start", "--against", "http://127.0.0.1:1"),
        ("saturation", "--tls", "--against", "http://127.0.0.1:1"),
        ("stream", "--web"),
        ("overhead", "--web", "--against", "http://127.0.0.1:1"),
    ],
)
def test_options_that_contradict_each_other_are_wrong_usage(ibexctl, words: tuple[str, ...]) -> None:
    outcome = ibexctl("bench", *words)
    assert outcome.code == 2
    assert "--web" in outcome.err or "--against" in outcome.err
