"""What the proxy costs, by the product's own benchmark, with everything on."""

from dataclasses import dataclass, field
from typing import Any

from infra.gate.programs import ProgramFailed, ctl
from infra.gate.proof import Proof, judge

USERS = 100
OVERHEAD_MS = 20.0
HIT_PERCENT = 90.0
ERROR_PERCENT = 0.1


@dataclass
class Benchmarks:
    """Each scenario is run once, however many lines read its figures."""

    overhead_seconds: float = 30
    stream_seconds: float = 10
    _results: dict[str, Any] = field(default_factory=dict)

    async def overhead(self) -> Proof:
        """p99 of what the server added to a request, by the server's own clock."""
        result = await self._run("overhead", self.overhead_seconds)
        found = result["server"]["overhead_ms"]
        measured = _contender(result)
        how = f"`ibexctl bench overhead`: locust, {USERS} users, everything on, {self.overhead_seconds:.0f} s"
        figure = (
            f"p99 {found['p99']:.1f} ms, p50 {found['p50']:.1f} ms (bar {OVERHEAD_MS:.0f});"
            f" {measured['throughput']:,.0f} answers/s, {_failed_percent(measured):.2f} % failed"
        )
        is_sound = _failed_percent(measured) < ERROR_PERCENT and _is_recorded(result)
        return judge(found["p99"] < OVERHEAD_MS and is_sound, how, figure)

    async def cache_hits(self) -> Proof:
        """The share of requests whose caller was known without a question to Postgres."""
        result = await self._run("overhead", self.overhead_seconds)
        rate = result["server"]["auth_hit_rate"] * 100
        return judge(rate > HIT_PERCENT, "the same run's counters", f"{rate:.2f} % (bar {HIT_PERCENT:.0f})")

    async def streaming(self) -> Proof:
        """Streams under load: told beside the bars, and failed only by errors or by turns not recorded."""
        result = await self._run("stream", self.stream_seconds)
        measured = _contender(result)
        percent = _failed_percent(measured)
        how = f"`ibexctl bench stream`: {USERS} streams at a time, {self.stream_seconds:.0f} s"
        figure = (
            f"first byte p99 {measured['first_byte_ms']['p99']:.1f} ms, whole stream p99"
            f" {measured['latency_ms']['p99']:.0f} ms, {measured['events_per_second']:,.0f} events/s,"
            f" {percent:.2f} % failed"
        )
        return judge(percent < ERROR_PERCENT and _is_recorded(result), how, figure)

    async def _run(self, scenario: str, seconds: float) -> Any:
        if scenario not in self._results:
            self._results[scenario] = await ctl("bench", scenario, "--users", str(USERS), "--duration", f"{seconds:g}")
        if self._results[scenario]["server"] is None:
            raise ProgramFailed(f"bench {scenario} could not read the server's figures")
        return self._results[scenario]


def _contender(result: Any) -> Any:
    return next(found for found in result["contenders"] if found["name"] == "ibex")


def _failed_percent(contender: Any) -> float:
    failed = int(sum(contender["failures"].values()))
    return 100.0 * failed / max(1, failed + int(contender["completed"]))


def _is_recorded(result: Any) -> bool:
    return bool(result["records"] and result["records"]["is_whole"])
