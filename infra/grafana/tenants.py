"""The dashboard of the organizations and their agents, from the traces in ClickHouse: metrics have no ids."""

from typing import Any

from panels import CLICKHOUSE, Dashboard, Panel, choose_source

FAILED = "countIf(outcome IN ('provider_error', 'incomplete')) / count()"
HERE = "$__timeFilter(requested_at) AND $__conditionalAll(org_id IN (${organization:singlequote}), $organization)"


def over_time(value: str, label: str, where: str = HERE, limit: int = 12) -> list[tuple[str, str]]:
    """A value over time for each of the greatest; what has no place among them is left out."""
    most = f"SELECT {label} FROM llm_traces WHERE {where} GROUP BY 1 ORDER BY count() DESC LIMIT {limit}"
    query = (
        f"SELECT $__timeInterval(requested_at) AS time, {label} AS name, {value} AS value FROM llm_traces"
        f" WHERE {where} AND {label} IN ({most}) GROUP BY time, name ORDER BY time, name"
    )
    return [(query, "")]


def leaders(label: str, limit: int = 25) -> list[tuple[str, str]]:
    """A table of who asked most."""
    query = (
        f"SELECT {label}, count() AS turns, sum(total_tokens) AS tokens, {FAILED} AS failed,"
        " quantile(0.95)(total_latency_ms) AS latency, quantile(0.95)(provider_ttfb_ms) AS first_byte,"
        " max(requested_at) AS last_seen"
        f" FROM llm_traces WHERE {HERE} GROUP BY {label} ORDER BY turns DESC LIMIT {limit}"
    )
    return [(query, "")]


UNITS = {
    "tokens": "short",
    "failed": "percentunit",
    "latency": "ms",
    "first_byte": "ms",
    "last_seen": "dateTimeFromNow",
}
ORG, AGENT = "toString(org_id)", "toString(agent_id)"
PER_SECOND = "count() / $__interval_s"
DIRECTIVES = (
    "SELECT agent_id, directive_version, count() AS turns, min(requested_at) AS first_seen,"
    f" max(requested_at) AS last_seen FROM llm_traces WHERE {HERE} AND directive_version IS NOT NULL"
    " GROUP BY agent_id, directive_version ORDER BY last_seen DESC LIMIT 50"
)

ORGANIZATION: dict[str, Any] = {
    "name": "organization",
    "label": "Organization",
    "type": "query",
    "datasource": CLICKHOUSE,
    "query": "SELECT DISTINCT toString(org_id) FROM llm_traces WHERE requested_at > now() - INTERVAL 7 DAY ORDER BY 1",
    "refresh": 1,
    "multi": True,
    "includeAll": True,
    "current": {"text": ["All"], "value": ["$__all"]},
}

TENANTS = Dashboard(
    uid="ibex-tenants",
    title="ibex / tenants",
    description="Who asks how much, what it costs in tokens, and how it ends, by organization, agent and model.",
    variables=[choose_source("clickhouse", CLICKHOUSE["type"]), ORGANIZATION],
    rows=[
        (
            "Organizations",
            [
                Panel(
                    "Turns by organization",
                    "Turns a second of the organizations with the most.",
                    "reqps",
                    over_time(PER_SECOND, ORG),
                    width=12,
                    is_stacked=True,
                    sql=True,
                ),
                Panel(
                    "Tokens by organization",
                    "Language tokens a second, input and output.",
                    "short",
                    over_time("sum(total_tokens) / $__interval_s", ORG),
                    width=12,
                    is_stacked=True,
                    sql=True,
                ),
                Panel(
                    "Organizations in order",
                    "The organizations with the most turns, what they cost and how they fare.",
                    "short",
                    leaders("org_id"),
                    kind="table",
                    width=24,
                    sql=True,
                    units=UNITS,
                ),
            ],
        ),
        (
            "Agents",
            [
                Panel(
                    "Turns by agent",
                    "Turns a second of the agents with the most.",
                    "reqps",
                    over_time(PER_SECOND, AGENT),
                    width=12,
                    is_stacked=True,
                    sql=True,
                ),
                Panel(
                    "Failures by agent",
                    "Share of turns the provider refused, failed or cut.",
                    "percentunit",
                    over_time(FAILED, AGENT),
                    width=12,
                    sql=True,
                ),
                Panel(
                    "Agents in order",
                    "The agents with the most turns.",
                    "short",
                    leaders("org_id, agent_id"),
                    kind="table",
                    width=24,
                    sql=True,
                    units=UNITS,
                ),
            ],
        ),
        (
            "Models",
            [
                Panel(
                    "Tokens by model",
                    "Language tokens a second.",
                    "short",
                    over_time("sum(total_tokens) / $__interval_s", "model"),
                    is_stacked=True,
                    sql=True,
                ),
                Panel(
                    "Latency by model",
                    "The p95 of whole turns.",
                    "ms",
                    over_time("quantile(0.95)(total_latency_ms)", "model"),
                    sql=True,
                ),
                Panel(
                    "Input tokens from the provider's cache",
                    "Share of input tokens the provider had in its cache, and charges less for.",
                    "percentunit",
                    over_time("sum(cached_tokens) / sum(input_tokens)", "model", f"{HERE} AND input_tokens > 0"),
                    sql=True,
                ),
            ],
        ),
        (
            "Ends and directives",
            [
                Panel(
                    "Ends",
                    "Turns a second by how they ended.",
                    "reqps",
                    over_time(PER_SECOND, "toString(outcome)"),
                    is_stacked=True,
                    sql=True,
                ),
                Panel(
                    "Errors",
                    "Turns a second by the code they failed with.",
                    "reqps",
                    over_time(PER_SECOND, "assumeNotNull(error_code)", f"{HERE} AND error_code IS NOT NULL"),
                    is_stacked=True,
                    sql=True,
                ),
                Panel(
                    "Directive versions in use",
                    "Turns by agent and the version of its directive that was in force: a change is seen to take over.",
                    "short",
                    [(DIRECTIVES, "")],
                    kind="table",
                    sql=True,
                    units={"first_seen": "dateTimeFromNow", "last_seen": "dateTimeFromNow"},
                ),
            ],
        ),
    ],
)
