"""How a sample is taken: the control socket, /metrics, /ready and ClickHouse, each asked beside the others."""

import asyncio
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from ibex.errors import OperatorError, StoreError
from ibexctl.bench.processes import cpu_seconds
from ibexctl.bench.scrape import Counted, Samples, scrape
from ibexctl.proxy import Proxy
from ibexctl.top.sample import Caches, Check, Journal, Latency, Leader, Limits, Process, Sample, Traffic
from ibexctl.top.usage import family_cpu_seconds, family_memory_bytes

if TYPE_CHECKING:
    from ibex.config import Settings
    from ibex.runtime import Operator
    from ibex.server.supervision.status import NodeStatus, ProcessStatus

WINDOW_SECONDS = 5.0
"""Rates are over so long at least: a node's metrics of its workers are up to a second old."""
_LEADERS_SECONDS = 2.0
_NAMES_SECONDS = 30.0
_READY_SECONDS = 3.0
_OPERATORS_ROUTES = {"ready", "health", "metrics"}
_LEADERS_SINCE = timedelta(minutes=1)


@dataclass(frozen=True, slots=True)
class _Look:
    """What was counted until one moment."""

    at: float
    started_at: str
    metrics: Samples
    cpu: Mapping[int, float]


class Collector:
    """Looks at a node; what it remembers of earlier looks makes the rates."""

    def __init__(self, settings: "Settings", operator: "Operator | None") -> None:
        """Without an operator nobody knows whose the organizations are."""
        self._settings = settings
        self._operator = operator
        self._looks: deque[_Look] = deque()
        self._names: dict[Any, str] = {}
        self._named_at = -_NAMES_SECONDS

    async def look(self) -> Sample:
        """Take a sample. Raises ServerNotRunning. The first has no rates: nothing to compare with."""
        from ibex.server.supervision.status import request_status

        node = await asyncio.to_thread(request_status, self._settings)
        metrics, ready, leaders = await asyncio.gather(
            asyncio.to_thread(scrape, node.metrics_url), asyncio.to_thread(_ask_ready, node.url), self._find_leaders()
        )
        now = _Look(time.monotonic(), node.started_at, metrics or {}, _cpu(node))
        before = self._remember(now)
        return _make_sample(self._settings, node, before, now, ready, leaders)

    def _remember(self, now: _Look) -> _Look:
        """The look to compare with: the latest that is old enough, else the oldest of the same server."""
        self._looks.append(now)
        while self._looks[0].started_at != now.started_at or (
            len(self._looks) > 1 and now.at - self._looks[1].at >= WINDOW_SECONDS
        ):
            self._looks.popleft()
        return self._looks[0]

    async def _find_leaders(self) -> list[Leader] | str:
        """The organizations with the most turns of the last minute, or why nobody knows."""
        from ibex.stores.clickhouse.stats import Scope

        operator = self._operator
        if operator is None:
            return "Organizations need IBEX_POSTGRES_ADMIN_DSN, which is not set."
        try:
            async with asyncio.timeout(_LEADERS_SECONDS):
                if time.monotonic() - self._named_at >= _NAMES_SECONDS:
                    self._names = {row["org_id"]: row["name"] for row in await operator.directory.list_orgs()}
                    self._named_at = time.monotonic()
                scope = Scope(org_ids=list(self._names), since=_LEADERS_SINCE)
                rows = await operator.traces.stats.sum_up(scope, by="org_id")
        except (StoreError, TimeoutError) as error:
            return getattr(error, "message", "") or "ClickHouse does not answer in time."
        return [
            Leader(
                org_id=row["org_id"],
                name=self._names[row["org_id"]],
                turns=row["turns"],
                errors=row["errors"],
                tokens=(row["input_tokens"] or 0) + (row["output_tokens"] or 0),
                p50_ms=row["p50_ms"],
            )
            for row in rows
        ]


def _ask_ready(url: str) -> dict[str, Any]:
    try:
        found = Proxy(url, "", "", answer_seconds=_READY_SECONDS).get("/ready").json()
        return found if isinstance(found, dict) and "checks" in found else {"status": "unreachable", "checks": {}}
    except OperatorError:
        return {"status": "unreachable", "checks": {}}


def _cpu(node: "NodeStatus") -> dict[int, float]:
    """Processor time by pid: an engine's with that of its children, which for the supervisor are all the others."""
    found = {
        process.pid: (family_cpu_seconds if _is_engine(process) else cpu_seconds)(process.pid)
        for process in node.processes
        if process.pid is not None
    }
    return {pid: seconds for pid, seconds in found.items() if seconds is not None}


def _is_engine(process: "ProcessStatus") -> bool:
    return process.name.startswith("engine")


def _make_sample(
    settings: "Settings",
    node: "NodeStatus",
    before: _Look,
    now: _Look,
    ready: dict[str, Any],
    leaders: list[Leader] | str,
) -> Sample:
    seconds = now.at - before.at
    counted = Counted(before.metrics, now.metrics)
    return Sample(
        at=datetime.now(UTC),
        seconds=round(seconds, 3),
        version=node.version,
        env=node.env,
        url=node.url,
        upstream="sandbox" if node.llm_mode == "sandbox" else node.upstream,
        uptime_seconds=round(node.uptime_seconds, 1),
        state=str(ready["status"]),
        traffic=_traffic(node, counted, seconds),
        latency={
            "request": _latency(counted, "request_duration_seconds", route="chat"),
            "overhead": _latency(counted, "overhead_seconds"),
            "first_byte": _latency(counted, "provider_ttfb_seconds"),
        },
        caches=Caches(auth=_hits(counted, "auth", tier="lru"), directive=_hits(counted, "directive")),
        limits=Limits(
            denied=_per_second(counted.total("rate_limited_total", result="denied"), seconds),
            redis_errors=_per_second(counted.total("rate_limit_redis_errors_total"), seconds),
        ),
        journal=_journal(settings, now.metrics),
        checks=[
            Check(name=name, status=found["status"], message=found.get("message"), latency_ms=found.get("latency_ms"))
            for name, found in ready["checks"].items()
        ],
        processes=[_process(process, before, now) for process in node.processes],
        leaders=None if isinstance(leaders, str) else leaders,
        leaders_missing=leaders if isinstance(leaders, str) else None,
    )


def _traffic(node: "NodeStatus", counted: Counted, seconds: float) -> Traffic:
    by_status: dict[str, float] = {}
    for (name, labels), value in counted.after.items():
        about = dict(labels)
        if name == "ibex_proxy_requests_total" and about["route"] not in _OPERATORS_ROUTES:
            grown = value - counted.before.get((name, labels), 0.0)
            by_status[about["status_code"]] = by_status.get(about["status_code"], 0.0) + grown
    workers = [process.facts for process in node.processes if process.name.startswith("worker")]
    streams = [facts["streams"] for facts in workers if "streams" in facts]
    return Traffic(
        requests=_per_second(sum(by_status.values()), seconds),
        streams=_per_second(counted.total("stream_duration_seconds_count"), seconds),
        in_flight=sum(int(facts.get("in_flight", 0)) for facts in workers),
        open_streams=sum(map(int, streams)) if streams else None,
        connections=int(_gauge(counted.after, "ibex_proxy_active_connections")),
        errors={
            status: _per_second(count, seconds)
            for status, count in sorted(by_status.items())
            if status >= "400" and count > 0
        },
        hang_ups=_per_second(counted.total("stream_client_disconnects_total"), seconds),
        input_tokens=_per_second(counted.total("tokens_total", direction="input"), seconds),
        output_tokens=_per_second(counted.total("tokens_total", direction="output"), seconds),
    )


def _process(process: "ProcessStatus", before: _Look, now: _Look) -> Process:
    cpu, pid = None, process.pid
    if pid is not None and pid in before.cpu and pid in now.cpu and now.at > before.at:
        cpu = round(max(0.0, now.cpu[pid] - before.cpu[pid]) / (now.at - before.at), 3)
    return Process(
        name=process.name,
        pid=pid,
        is_up=process.is_up,
        uptime_seconds=process.uptime_seconds,
        restarts=process.restarts,
        cpu=cpu,
        memory_bytes=family_memory_bytes(pid) if pid is not None and _is_engine(process) else process.memory_bytes,
        in_flight=process.facts.get("in_flight"),
    )


def _journal(settings: "Settings", metrics: Samples) -> Journal:
    return Journal(
        pending_turns=int(_gauge(metrics, "ibex_proxy_journal_pending_turns")),
        oldest_seconds=round(_gauge(metrics, "ibex_proxy_journal_oldest_seconds"), 3),
        bytes=int(_gauge(metrics, "ibex_proxy_journal_bytes")),
        max_bytes=settings.journal_max_bytes,
        dead_letters=int(_gauge(metrics, "ibex_proxy_journal_dead_letters")),
    )


def _gauge(metrics: Samples, name: str) -> float:
    return sum(value for (found, _), value in metrics.items() if found == name)


def _latency(counted: Counted, name: str, **labels: str) -> Latency:
    found = counted.quantiles(name, **labels)
    return Latency(p50_ms=found["p50"], p99_ms=found["p99"]) if found else Latency(p50_ms=None, p99_ms=None)


def _hits(counted: Counted, cache: str, **labels: str) -> float | None:
    hits = counted.total(f"{cache}_cache_hits_total", **labels)
    asked = hits + counted.total(f"{cache}_cache_misses_total", **labels)
    return round(hits / asked, 4) if asked > 0 else None


def _per_second(count: float, seconds: float) -> float:
    return round(max(count, 0.0) / seconds, 3) if seconds > 0 else 0.0
