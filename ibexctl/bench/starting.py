"""Starts: of the command line, of a node, of a node where the stores run already, and what its first burst sees."""

import subprocess
import sys
import time
from datetime import UTC, datetime
from statistics import median
from typing import Any

from ibex.config import Secret
from ibexctl.bench.callers import Callers, Target, build_requests, register_callers
from ibexctl.bench.contest import Result, own_provider, server_settings
from ibexctl.bench.lean import running_generator
from ibexctl.bench.load import Load, Tick
from ibexctl.bench.outcome import DIRECT, IBEX, Outcome
from ibexctl.bench.plan import Plan
from ibexctl.bench.processes import Cores, count_connections, describe_machine
from ibexctl.bench.progress import Progress
from ibexctl.bench.records import count_records
from ibexctl.trial import Trial, ending_on_sigterm, own_trial

_TIMES = 3


def run_start(plan: Plan) -> Result:
    """Measure starts: of the command line, of a node with new stores, of nodes beside running stores, and a burst."""
    cores = Cores(reason="a start takes what cores there are")
    result = Result(plan=plan, at=datetime.now(UTC), machine=describe_machine(), cores=cores, outcomes=[])
    progress = Progress()
    with ending_on_sigterm(), own_provider(plan) as upstream:
        progress.begin("ibexctl --help")
        result.starts["help"] = median(_time_help() for _ in range(_TIMES))
        direct = Outcome(name=DIRECT, title="provider alone")
        burst(direct, upstream, None, plan.users, upstream)
        result.outcomes.append(direct)
        settings = server_settings(plan, upstream)
        begun = time.monotonic()
        with own_trial(has_quiet_log=False, **settings) as first:
            result.starts["first"] = time.monotonic() - begun
            callers = register_callers(first.settings, plan.tokens)
            _start_beside(result, settings | _stores_of(first), callers, upstream)
            progress.begin("counting records")
            answered = sum(outcome.answered for outcome in result.outcomes if outcome.name == IBEX)
            if callers.org_id is not None:
                result.records = count_records(first.settings, callers.org_id, answered)
            progress.begin("stopping")
        progress.end()
    return result


def burst(outcome: Outcome, target: Target, callers: Callers | None, users: int, upstream: Target) -> None:
    """One request of each user, all at once; the users' own connections are there already."""
    made = 0

    def look(_tick: Tick) -> None:
        nonlocal made
        made = max(made, count_connections(upstream.port))

    load = Load(
        host=target.host,
        port=target.port,
        is_tls=target.is_tls,
        authority=target.authority_file,
        users=users,
        seconds=0.5,
        warmup_seconds=0.0,
        think_seconds=1.0,  # longer than it lasts: nobody asks twice
        requests=build_requests(target, callers, users=users, stream_share=0.0),
    )
    with running_generator(load, look) as generator:
        generator.warm()
        outcome.fill(generator.measure())
    outcome.upstream_connections = made


def _start_beside(result: Result, settings: dict[str, Any], callers: Callers, upstream: Target) -> None:
    """Start nodes on the stores of the first; the last of them has a burst as its first requests."""
    took = []
    for number in range(_TIMES):
        begun = time.monotonic()
        with own_trial(has_quiet_log=False, **settings) as node:
            took.append(time.monotonic() - begun)
            if number == _TIMES - 1:
                outcome = Outcome(name=IBEX, title="ibex, just started")
                burst(outcome, Target.parse(node.address), callers, result.plan.users, upstream)
                result.outcomes.append(outcome)
    result.starts["ready"] = median(took)


def _time_help() -> float:
    begun = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "ibexctl", "--help"], check=True, stdin=subprocess.DEVNULL, capture_output=True
    )
    return time.monotonic() - begun


def _stores_of(trial: Trial) -> dict[str, Any]:
    """Where the stores of a running server are, as settings of another."""
    from ibex.engines.addresses import resolve_addresses

    found = resolve_addresses(trial.settings)
    return {
        "postgres_dsn": Secret(found.postgres),
        "postgres_admin_dsn": Secret(found.postgres_admin),
        "redis_url": Secret(found.redis),
        "clickhouse_dsn": Secret(found.clickhouse),
    }
