"""A benchmark's result as data and as what people read."""

from typing import Any

from ibexctl.bench.contest import Result
from ibexctl.bench.outcome import Outcome
from ibexctl.bench.plan import Scenario
from ibexctl.bench.verdict import Check, format_figure
from ibexctl.output import Fields, Table, View

_COLUMNS = ("contender", "answers/s", "p50 ms", "p95 ms", "p99 ms", "p99.9 ms", "failed", "CPU µs/req", "core used")
_VERDICT = {True: "passed", False: "FAILED", None: "not measured"}


def result_data(result: Result) -> dict[str, Any]:
    """The object of `--json`, without its verdict."""
    records = result.records
    return {
        "scenario": result.plan.scenario.value,
        "at": result.at,
        "machine": result.machine,
        "cores": result.cores.describe(),
        "plan": result.plan.describe(),
        "features": result.features,
        "contenders": [outcome.as_data() for outcome in result.outcomes],
        "server": result.server,
        "records": None
        if records is None
        else {
            "expected": records.expected,
            "checkpoints": records.checkpoints,
            "traces": records.traces,
            "all_there_after_seconds": records.seconds,
            "is_whole": records.is_whole,
        },
        "records_skipped": result.records_skipped,
    }


def result_views(result: Result, checks: list[Check], *, is_passed: bool) -> list[View]:
    """What a person reads."""
    is_stream = result.plan.scenario is Scenario.STREAM
    columns = (*_COLUMNS, "first byte p50", "p99", "CPU µs/event") if is_stream else _COLUMNS
    rows = [_row(outcome, is_stream) for outcome in result.outcomes]
    plan = result.plan
    title = f"{plan.scenario.value}: {plan.users} users, {plan.seconds:g} s, {plan.workers} worker(s)"
    views: list[View] = [
        f"{title}, at {result.at.isoformat(timespec='seconds')}",
        Fields({**result.machine, "pinned": _pinning(result)}),
        "",
        Table(columns, rows),
    ]
    if result.server is not None:
        overhead = {name: found for name, found in result.server.items() if name.startswith("overhead") and found}
        views += ["", Fields({f"{name} (server)": found for name, found in overhead.items()})]
    if result.features:
        views += ["", "what was on:", Fields(result.features)]
    if result.records is not None:
        found = result.records
        counts = f"{found.expected:,} answers (warm-up included), {found.checkpoints:,} checkpoints"
        views += ["", f"records: {counts}, {found.traces:,} traces, {found.seconds:.1f} s after the last answer"]
    elif result.records_skipped:
        views += ["", f"records: not counted; {result.records_skipped}"]
    verdicts = [_judgement(check) for check in checks]
    views += ["", Table(("target", "measured", "", "limit", "unit", "verdict", "detail"), verdicts)]
    return [*views, "", f"Benchmark {plan.scenario.value}: {'PASSED' if is_passed else 'FAILED'}"]


def _judgement(check: Check) -> tuple[object, ...]:
    measured, limit = format_figure(check.measured), format_figure(check.limit)
    return check.name, measured, check.comparison, limit, check.unit, _VERDICT[check.is_passed], check.detail


def _row(outcome: Outcome, is_stream: bool) -> tuple[object, ...]:
    if outcome.skipped is not None:
        return (f"{outcome.title}: skipped, {outcome.skipped}", *[None] * (len(_COLUMNS) - 1 + 3 * is_stream))
    found = outcome.latency.summary()
    row = (
        outcome.title,
        f"{outcome.throughput:,.0f}",
        *(found[name] for name in ("p50", "p95", "p99", "p99_9")),
        sum(outcome.failures.values()),
        _short(outcome.cpu_us_per_request),
        None if outcome.cpu_share is None else f"{outcome.cpu_share:.0%}",
    )
    if not is_stream:
        return row
    first = outcome.first_byte.summary()
    return (*row, first["p50"], first["p99"], _short(outcome.cpu_us_per_event))


def _pinning(result: Result) -> str:
    cores = result.cores
    if not cores.measured:
        return f"no: {cores.reason}"
    return f"nginx and workers on core {_list(cores.measured)}; load, provider and stores on {_list(cores.rest)}"


def _list(numbers: frozenset[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))


def _short(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f}"
