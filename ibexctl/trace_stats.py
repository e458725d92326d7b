"""`ibexctl trace stats`: turns, tokens, latencies, endings and errors summed up, with small charts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any, Literal
from uuid import UUID

import typer

from ibex.domain.identity import AgentId
from ibexctl import arguments
from ibexctl.charts import bar, sparkline
from ibexctl.command import command
from ibexctl.identity import AgentFilter, OrgFilter
from ibexctl.operation import operate
from ibexctl.output import Answer, Fields, Table, View
from ibexctl.status import format_span
from ibexctl.traces import scope_of

if TYPE_CHECKING:
    from ibex.runtime import Operator
    from ibex.stores.clickhouse.stats import StatsKey

By = Literal["org", "agent", "model", "outcome", "hour"]
Rows = Sequence[Mapping[str, Any]]

_KEYS: "dict[By, StatsKey]" = {
    "org": "org_id", "agent": "agent_id", "model": "model", "outcome": "outcome", "hour": "hour"
}  # fmt: skip
_COLUMNS = ("turns", "errors", "input_tokens", "output_tokens", "p50_ms", "p95_ms", "p99_ms")
_SLOTS = 60
_BAR_WIDTH = 12
_EXAMPLE = """\
ibexctl trace stats
ibexctl trace stats --by agent --since 7d
ibexctl trace stats --by hour --org acme --since 12h"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "stats", example=_EXAMPLE)(show_stats)


@dataclass(frozen=True, slots=True)
class _Found:
    """What was summed up."""

    groups: Rows
    outcomes: Rows
    errors: Rows
    timeline: Rows


def show_stats(
    by: Annotated[By, typer.Option("--by", help="What to sum up by.")] = "model",
    org: OrgFilter = None,
    agent: AgentFilter = None,
    since: Annotated[
        timedelta,
        typer.Option(
            "--since", metavar="SPAN", parser=arguments.duration, help="The time up to now, such as 1h or 7d."
        ),
    ] = "24h",  # type: ignore[assignment]  # typer parses the default as it does a value
) -> Answer:
    """Sum traces up: turns, tokens, latencies, how they ended, and with which errors.

    Errors are turns the provider failed or cut. The latencies are those of whole replies. The bars show each one's
    share of the turns, the lines when turns and tokens were.
    """
    key = _KEYS[by]

    async def act(operator: "Operator") -> _Found:
        from ibex.stores.clickhouse.stats import Scope

        org_ids = await scope_of(operator, org)
        scope = Scope(org_ids=org_ids, since=since, agent=None if agent is None else AgentId(agent))
        groups = await operator.traces.stats.sum_up(scope, key)
        if by in ("org", "agent"):
            names = await _names(operator, by)
            groups = [{key: row[key], "name": names.get(row[key]), **row} for row in groups]
        return _Found(
            groups,
            await operator.traces.stats.sum_up(scope, "outcome"),
            await operator.traces.stats.count_errors(scope),
            await operator.traces.stats.draw(scope, _SLOTS),
        )

    found = operate(act, clickhouse=True)
    data = {
        "by": by,
        "since": since,
        "stats": found.groups,
        "outcomes": {row["outcome"]: row["turns"] for row in found.outcomes},
        "errors": {row["error_code"]: row["turns"] for row in found.errors},
        "timeline": {"slot_seconds": since.total_seconds() / _SLOTS, "slots": found.timeline},
    }
    return Answer(data, tuple(_views(found, by, since)))


async def _names(operator: "Operator", by: By) -> dict[UUID, str]:
    rows = await (operator.directory.list_orgs() if by == "org" else operator.directory.list_agents())
    return {row[_KEYS[by]]: row["name"] for row in rows}


def _views(found: _Found, by: By, since: timedelta) -> list[View]:
    if not found.groups:
        return [Table((_KEYS[by], *_COLUMNS), (), empty="No turn in this time.")]
    turns = sum(row["turns"] for row in found.groups)
    facts = {
        "turns": f"{turns:,} in {format_span(since.total_seconds())}",
        "when": f"▕{sparkline([slot['turns'] for slot in found.timeline])}▏",
        "tokens": f"▕{sparkline([slot['tokens'] for slot in found.timeline])}▏",
        "outcomes": _shares(found.outcomes, "outcome", turns),
        "errors": ", ".join(f"{row['error_code']} {row['turns']:,}" for row in found.errors) or "none",
    }
    key, most = _KEYS[by], max(row["turns"] for row in found.groups)
    is_named = "name" in found.groups[0]
    columns = ("name" if is_named else key, *_COLUMNS, "", *((key,) if is_named else ()))
    rows = [
        (
            row["name"] if is_named else row[key],
            *(_rounded(row[column]) for column in _COLUMNS),
            bar(row["turns"], most, _BAR_WIDTH),
            *((row[key],) if is_named else ()),
        )
        for row in found.groups
    ]
    return [Fields(facts), "", Table(columns, rows)]


def _shares(rows: Rows, key: str, turns: int) -> str:
    return ", ".join(f"{row[key]} {row['turns']:,} ({row['turns'] / turns:.1%})" for row in rows)


def _rounded(value: Any) -> Any:
    return round(value, 1) if isinstance(value, float) else value
