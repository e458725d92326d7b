"""Traces summed up: turns, tokens, latencies, endings and errors, by whose they are and over time."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from math import isnan
from typing import Any, Literal, Protocol

from ibex.domain.identity import AgentId, OrgId

StatsKey = Literal["org_id", "agent_id", "model", "outcome", "hour"]
"""What traces can be summed up by."""

_KEYS: dict[StatsKey, str] = {"hour": "toStartOfHour(requested_at) as hour"}
"""Those that are no column."""

_STATS = (
    "count() as turns",
    "countIf(outcome in ('provider_error', 'incomplete')) as errors",
    "countIf(outcome = 'client_disconnect') as disconnects",
    "countIf(outcome = 'replayed') as replays",
    "sum(input_tokens) as input_token_sum",
    "sum(output_tokens) as output_token_sum",
    "quantileIf(0.5)(total_latency_ms, outcome = 'ok') as p50_ms",
    "quantileIf(0.95)(total_latency_ms, outcome = 'ok') as p95_ms",
    "quantileIf(0.99)(total_latency_ms, outcome = 'ok') as p99_ms",
)
"""Latencies are those of whole replies: an error is often quick, and a replay asks nobody. Unknown tokens count as
none; where none are known the sum is null."""

Row = dict[str, Any]


class Select(Protocol):
    """The one query of `TraceStore`, which cannot be asked without organizations."""

    async def __call__(
        self,
        columns: Sequence[str],
        org_ids: Sequence[OrgId],
        condition: str,
        parameters: dict[str, Any] | None = None,
        *,
        rest: str = "",
    ) -> list[Row]:
        """Rows of these organizations alone."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """Which traces are summed up: those of these organizations, of the time up to now, of one agent if one is named."""

    org_ids: Sequence[OrgId]
    since: timedelta
    agent: AgentId | None = None


class TraceStats:
    """Sums over traces; each names the organizations whose rows it may see."""

    def __init__(self, select: Select) -> None:
        self._select = select

    async def sum_up(self, scope: Scope, by: StatsKey) -> list[Row]:
        """Turns, errors, tokens and latencies (ms) for each value of `by`: the busiest first, hours in their order."""
        order = by if by == "hour" else f"turns desc, {by}"
        rows = await self._ask(scope, (_KEYS.get(by, by), *_STATS), rest=f"group by {by} order by {order}")
        return [{name.replace("token_sum", "tokens"): _number(value) for name, value in row.items()} for row in rows]

    async def count_errors(self, scope: Scope) -> list[Row]:
        """Each `error_code` that turns ended with, and how many `turns` did, the most frequent first."""
        rest = "and error_code is not null group by error_code order by turns desc, error_code"
        return await self._ask(scope, ("error_code", "count() as turns"), rest=rest)

    async def draw(self, scope: Scope, slots: int) -> list[Row]:
        """The time of the scope in so many equal parts, the oldest first: `turns`, `errors` and `tokens` of each."""
        columns = (
            "intDiv(toUnixTimestamp64Milli(now64(3)) - toUnixTimestamp64Milli(requested_at), {step:Int64}) as age",
            "count() as turns",
            "countIf(outcome in ('provider_error', 'incomplete')) as errors",
            "sum(ifNull(total_tokens, 0)) as tokens",
        )
        step = max(1, -(-int(scope.since.total_seconds() * 1000) // slots))
        found = {row.pop("age"): row for row in await self._ask(scope, columns, rest="group by age", step=step)}
        nothing = {"turns": 0, "errors": 0, "tokens": 0}
        return [found.get(age, nothing) for age in reversed(range(slots))]

    async def _ask(self, scope: Scope, columns: Sequence[str], *, rest: str, **more: Any) -> list[Row]:
        condition = "requested_at >= now64(3) - toIntervalSecond({seconds:UInt64})"
        parameters: dict[str, Any] = {"seconds": int(scope.since.total_seconds()), **more}
        if scope.agent is not None:
            condition += " and agent_id = {agent:UUID}"
            parameters["agent"] = scope.agent
        return await self._select(columns, scope.org_ids, condition, parameters, rest=rest)


def _number(value: Any) -> Any:
    """None for the quantile of nothing."""
    return None if isinstance(value, float) and isnan(value) else value
