"""What a run had to reach, and whether it did: targets of its scenario, and no loss against an earlier run."""

import json
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ibex.errors import OperatorError
from ibexctl.bench.contest import Result
from ibexctl.bench.outcome import DIRECT, IBEX, NGINX, Outcome
from ibexctl.bench.plan import Scenario

TOLERANCE = 0.2
"""How much worse than its baseline a figure may be."""
NGINX_SHARE = 6.0
CPU_US_PER_REQUEST = 125.0
CPU_US_PER_EVENT = 25.0
OVERHEAD_P99_MS = 20.0
ADDED_FIRST_BYTE_P99_MS = 5.0
FIRST_BYTE_USERS = 100
"""With more streams at a time a core is at its end, and who waits for it longest says nothing of the rest."""
FAILURE_SHARE = 0.001
MEMORY_PER_STREAM_KIB = 40.0
GROWTH_A_MINUTE = {"memory_bytes": (1 << 20, 0.5, "MiB"), "descriptors": (1, 1.0, ""), "tasks": (1, 1.0, "")}
"""By what a process holds: the unit, how many of it a minute are no growth yet, and its name."""
HELP_SECONDS = 0.3
READY_SECONDS = 1.5


@dataclass(frozen=True, slots=True)
class Check:
    """One thing a run had to reach."""

    name: str
    measured: float | None
    comparison: str
    limit: float
    unit: str = ""
    detail: str = ""

    @property
    def is_passed(self) -> bool | None:
        """None: it could not be measured."""
        if self.measured is None:
            return None
        compare = {"<": operator.lt, "≤": operator.le, ">": operator.gt, "≥": operator.ge, "=": operator.eq}
        return bool(compare[self.comparison](self.measured, self.limit))

    def as_data(self) -> dict[str, object]:
        """For `--json`."""
        return {
            "name": self.name,
            "measured": None if self.measured is None else round(self.measured, 5),
            "comparison": self.comparison,
            "limit": round(self.limit, 5),
            "unit": self.unit,
            "detail": self.detail,
            "passed": self.is_passed,
        }


def format_figure(value: float | None) -> str:
    """A figure as people read it: three digits that count, large ones whole."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def judge(result: Result) -> list[Check]:
    """Every target of the scenario that was run."""
    measured = result.find(IBEX)
    if measured is None:
        return []
    checks = [Check("failed requests", measured.failure_share * 100, "<", FAILURE_SHARE * 100, "%")]
    by_scenario = {
        Scenario.OVERHEAD: _judge_overhead,
        Scenario.SATURATION: _judge_saturation,
        Scenario.STREAM: _judge_stream,
        Scenario.SOAK: _judge_soak,
        Scenario.START: _judge_start,
    }
    checks += by_scenario[result.plan.scenario](result, measured)
    checks += _judge_caches(result)
    if result.records is not None:
        expected = float(result.records.expected)
        checks.append(Check("checkpoints by answers", float(result.records.checkpoints), "=", expected))
        checks.append(Check("traces by answers", float(result.records.traces), "=", expected))
    return checks


def _judge_overhead(result: Result, _measured: Outcome) -> Iterator[Check]:
    overhead = (result.server or {}).get("overhead_ms")
    yield Check("overhead p99, by the server", overhead and overhead["p99"], "<", OVERHEAD_P99_MS, "ms")


def _judge_saturation(result: Result, measured: Outcome) -> Iterator[Check]:
    nginx = result.find(NGINX)
    if nginx is not None:
        used = "" if nginx.cpu_share is None else f", which used {nginx.cpu_share:.0%} of its core"
        limit = nginx.throughput / NGINX_SHARE
        yield Check("answers a second", measured.throughput, "≥", limit, "/s", f"1/6 of nginx{used}")
    yield Check("worker's processor time", measured.cpu_us_per_request, "≤", CPU_US_PER_REQUEST, "µs a request")
    if measured.throughput:
        limit = 2.5 * result.plan.users / measured.throughput * 1e3
        yield Check("p99", measured.latency.quantile(0.99) * 1e3, "≤", limit, "ms", "2.5 × users ÷ throughput")


def _judge_stream(result: Result, measured: Outcome) -> Iterator[Check]:
    direct = result.find(DIRECT)
    if direct is not None and direct.first_byte.count and result.plan.users <= FIRST_BYTE_USERS:
        added = (measured.first_byte.quantile(0.99) - direct.first_byte.quantile(0.99)) * 1e3
        yield Check("added time to first byte, p99", added, "≤", ADDED_FIRST_BYTE_P99_MS, "ms")
    yield Check("worker's processor time", measured.cpu_us_per_event, "≤", CPU_US_PER_EVENT, "µs an event")
    if measured.held_streams:
        each = measured.memory_per_stream_bytes
        detail = f"{measured.held_streams:,} at once"
        yield Check(
            "memory an open stream", None if each is None else each / 1024, "≤", MEMORY_PER_STREAM_KIB, "KiB", detail
        )


def _judge_soak(_result: Result, measured: Outcome) -> Iterator[Check]:
    for process, holdings in measured.growth.items():
        for held, (unit, limit, unit_name) in GROWTH_A_MINUTE.items():
            slope = holdings[held]["per_minute"]
            detail = "after the first third" if slope is not None else "too short a run to tell"
            measured_slope = None if slope is None else slope / unit
            name = f"{process}: {held.removesuffix('_bytes')}"
            yield Check(name, measured_slope, "≤", limit, f"{unit_name} a minute".strip(), detail)
    half = len(measured.timeline) // 2
    if half:
        first, second = sum(measured.timeline[:half]) / half, sum(measured.timeline[-half:]) / half
        yield Check("throughput, second half by first", second / first if first else None, "≥", 1 - TOLERANCE, "×")


def _judge_start(result: Result, _measured: Outcome) -> Iterator[Check]:
    yield Check("ibexctl --help", result.starts.get("help"), "≤", HELP_SECONDS, "s")
    yield Check("serve ready, stores running", result.starts.get("ready"), "≤", READY_SECONDS, "s")


def _judge_caches(result: Result) -> Iterator[Check]:
    if result.server is not None and result.plan.scenario is not Scenario.START:  # there every caller is a stranger
        least = 90.0 if result.plan.scenario is Scenario.OVERHEAD else 99.0
        rate = result.server["auth_hit_rate"]
        yield Check("auth cache hits", None if rate is None else rate * 100, ">", least, "%")


def key_figures(result: Mapping[str, Any]) -> dict[str, tuple[float, bool]]:
    """The figures of a result (as `--json` wrote it) that a later run is compared by, and whether more is better."""
    found: dict[str, tuple[float | None, bool]] = {}
    for contender in result.get("contenders", ()):
        if contender["name"] == IBEX and not contender.get("skipped"):
            found["throughput"] = contender["throughput"], True
            found["p50"] = contender["latency_ms"]["p50"], False
            found["p99"] = contender["latency_ms"]["p99"], False
            found["cpu_us_per_request"] = contender["cpu_us_per_request"], False
            found["cpu_us_per_event"] = contender["cpu_us_per_event"], False
            found["memory_per_stream_bytes"] = contender.get("memory_per_stream_bytes"), False
    overhead = (result.get("server") or {}).get("overhead_ms") or {}
    found["overhead_p99"] = overhead.get("p99"), False
    found["ready_seconds"] = (result.get("starts_seconds") or {}).get("ready"), False
    return {name: (value, is_more) for name, (value, is_more) in found.items() if value}


def read_baseline(path: Path) -> dict[str, Any]:
    """An earlier run's `--json`. Raises OperatorError."""
    try:
        baseline = json.loads(path.read_text())
        key_figures(baseline)
    except OSError as error:
        raise OperatorError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise OperatorError(
            f"{path} is no result of a benchmark.", hint="Write one: ibexctl bench saturation --json > FILE"
        ) from None
    return dict(baseline)


def compare(baseline: Mapping[str, Any], result: Mapping[str, Any]) -> list[Check]:
    """Whether each key figure is at most a fifth worse than the baseline's. Raises OperatorError."""
    if baseline.get("scenario") != result["scenario"]:
        raise OperatorError(f"The baseline is of the scenario {baseline.get('scenario')}, not {result['scenario']}.")
    now = key_figures(result)
    checks = []
    for name, (before, is_more_better) in key_figures(baseline).items():
        if name not in now:
            continue
        limit = before * (1 - TOLERANCE) if is_more_better else before * (1 + TOLERANCE)
        comparison = "≥" if is_more_better else "≤"
        checks.append(Check(f"{name} by baseline", now[name][0], comparison, limit, detail=f"baseline {before:g}"))
    return checks
