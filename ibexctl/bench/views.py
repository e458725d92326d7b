"""A benchmark's result as data and as what people read."""

from collections.abc import Callable, Sequence
from typing import Any

from ibexctl.bench.contest import Result
from ibexctl.bench.outcome import Outcome
from ibexctl.bench.plan import Scenario
from ibexctl.bench.verdict import Check, format_figure
from ibexctl.output import Fields, Table, View

_COLUMNS = ("contender", "answers/s", "p50 ms", "p95 ms", "p99 ms", "p99.9 ms", "failed", "CPU µs/req", "core used")
_HELD = ("first", "last", "per_minute")
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
        "starts_seconds": {name: round(seconds, 3) for name, seconds in result.starts.items()},
    }


def result_views(result: Result, checks: list[Check], *, is_passed: bool) -> list[View]:
    """What a person reads."""
    plan = result.plan
    further = _FURTHER.get(plan.scenario, ())
    columns = (*_COLUMNS, *(name for name, _ in further))
    rows = [_row(outcome, [tell for _, tell in further]) for outcome in result.outcomes]
    title = f"{plan.scenario.value}: {plan.users} users, {plan.seconds:g} s, {plan.workers} worker(s)"
    views: list[View] = [
        f"{title}, at {result.at.isoformat(timespec='seconds')}",
        Fields({**result.machine, "pinned": _pinning(result)}),
        "",
        Table(columns, rows),
    ]
    for outcome in result.outcomes:
        views += _describe_soak(outcome)
    if result.starts:
        views += ["", "starts (s):", Fields({name: f"{took:.2f}" for name, took in result.starts.items()})]
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


def _describe_soak(outcome: Outcome) -> list[View]:
    """What was loaded beside, and what the processes held from the first look to the last."""
    views: list[View] = []
    for name, tally in outcome.beside.items():
        first, failed = tally.first_bytes().summary()["p99"], sum(tally.failures.values())
        views += ["", f"{name}: {tally.completed:,} whole, {failed} failed, first byte p99 {first} ms"]
    rows = [
        (process, held.removesuffix("_bytes"), *(_format_held(held, found[name]) for name in _HELD))
        for process, holdings in outcome.growth.items()
        for held, found in holdings.items()
        if held != "memory_timeline"
    ]
    return (
        [*views, "", Table(("process", "what it holds", "first", "last", "growth a minute"), rows)] if rows else views
    )


def _format_held(held: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value / (1 << 20):.2f} MiB" if held.endswith("_bytes") else f"{value:g}"


def _row(outcome: Outcome, further: Sequence[Callable[[Outcome], object]]) -> tuple[object, ...]:
    if outcome.skipped is not None:
        return (f"{outcome.title}: skipped, {outcome.skipped}", *[None] * (len(_COLUMNS) - 1 + len(further)))
    found = outcome.latency.summary()
    return (
        outcome.title,
        f"{outcome.throughput:,.0f}",
        *(found[name] for name in ("p50", "p95", "p99", "p99_9")),
        sum(outcome.failures.values()),
        _short(outcome.cpu_us_per_request),
        None if outcome.cpu_share is None else f"{outcome.cpu_share:.0%}",
        *(tell(outcome) for tell in further),
    )


def _pinning(result: Result) -> str:
    cores = result.cores
    if not cores.measured:
        return f"no: {cores.reason}"
    return f"nginx and workers on core {_list(cores.measured)}; load, provider and stores on {_list(cores.rest)}"


def _list(numbers: frozenset[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))


def _short(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f}"


def _tell_memory_per_stream(outcome: Outcome) -> str | None:
    each = outcome.memory_per_stream_bytes
    return None if each is None else f"{each / 1024:.1f}"


_FURTHER: dict[Scenario, tuple[tuple[str, Callable[[Outcome], object]], ...]] = {
    Scenario.STREAM: (
        ("first byte p50", lambda outcome: outcome.first_byte.summary()["p50"]),
        ("p99", lambda outcome: outcome.first_byte.summary()["p99"]),
        ("CPU µs/event", lambda outcome: _short(outcome.cpu_us_per_event)),
        ("KiB/stream", _tell_memory_per_stream),
    ),
    Scenario.START: (("connections", lambda outcome: outcome.upstream_connections),),
}
"""Columns of a scenario alone."""
