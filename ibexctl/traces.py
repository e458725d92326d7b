"""`ibexctl trace`: what each request cost in time and tokens, and how it ended."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

from ibex.domain.identity import AgentId
from ibex.errors import UnknownEntity
from ibexctl import arguments
from ibexctl.command import command, group
from ibexctl.identity import AgentFilter, Limit, OrgFilter
from ibexctl.operation import operate
from ibexctl.output import Answer, Fields, Table, View

if TYPE_CHECKING:
    from ibex.domain.identity import OrgId
    from ibex.runtime import Operator

app = group("Traces: what each request cost, and how it ended.")

_COLUMNS = (
    "requested_at",
    "session_id",
    "model",
    "outcome",
    "status_code",
    "input_tokens",
    "output_tokens",
    "total_latency_ms",
    "turn_id",
)
_BAR_WIDTH = 48


@command(app, "list", example="ibexctl trace list --org acme --limit 20")
def list_traces(
    org: OrgFilter = None,
    agent: AgentFilter = None,
    session: Annotated[
        str | None, typer.Option("--session", metavar="SESSION", help="Of this session alone (its client's id).")
    ] = None,
    limit: Limit = 50,
) -> Answer:
    """List traces, newest first: one for each request that reached for a provider, however it ended.

    A trace is there half a second after its reply; refused requests leave none. They are kept for 90 days.
    """

    async def act(operator: "Operator") -> list[dict[str, Any]]:
        agent_id = None if agent is None else AgentId(agent)
        return await operator.traces.list(
            org_ids=await scope_of(operator, org), agent=agent_id, session=session, limit=limit
        )

    found = operate(act, clickhouse=True)
    rows = [[trace.get(column) for column in _COLUMNS] for trace in found]
    return Answer({"traces": found}, (Table(_COLUMNS, rows, empty="No trace yet."),))


@command(app, "show", example="ibexctl trace show 0199a2f6-5a1e-7c3b-9d0e-3f1f2a6b7c8d")
def show_trace(
    trace: Annotated[
        UUID,
        typer.Argument(
            metavar="ID", parser=arguments.identifier, help="A turn's id, or a request's: it may have several."
        ),
    ],
) -> Answer:
    """Show the traces of a turn or of a request, with the time each stage took.

    A reply names its turn in X-IBEX-Turn-ID and its request in X-Request-ID.
    """

    async def act(operator: "Operator") -> list[dict[str, Any]]:
        return await operator.traces.show(trace, org_ids=await operator.all_org_ids())

    found = operate(act, clickhouse=True)
    if not found:
        raise UnknownEntity(
            f"There is no trace of a turn or request {trace}.",
            hint="A trace is visible half a second after its response; refused requests leave none.",
        )
    traces = [{**row, "stages": stages(row)} for row in found]
    return Answer({"traces": traces}, tuple(view for row in traces for view in _views(row)))


async def scope_of(operator: "Operator", org: str | None) -> "list[OrgId]":
    """The organizations a query may see: the one that is named, else all."""
    return await operator.all_org_ids() if org is None else [await operator.directory.find_org(org)]


def stages(trace: Mapping[str, Any]) -> list[dict[str, object]]:
    """The stages of a trace in their order: name, start and duration in ms from the request's arrival."""
    prepared = [trace[f"{name}_latency_us"] / 1000 for name in ("auth", "rate_limit", "directive")]
    rest = max(trace["overhead_latency_us"] / 1000 - sum(prepared), 0.0)
    total = float(trace["total_latency_ms"])
    named = [*zip(("auth", "rate_limit", "directive", "proxy"), (*prepared, rest), strict=True)]
    if trace["provider_ttfb_ms"] is not None:
        named.append(("provider", float(trace["provider_ttfb_ms"])))
        named.append(("relay", max(total - sum(duration for _, duration in named), 0.0)))
    start, found = 0.0, []
    for name, duration in named:
        found.append({"name": name, "start_ms": round(start, 3), "duration_ms": round(duration, 3)})
        start += duration
    return found


def _views(trace: Mapping[str, Any]) -> tuple[View, ...]:
    facts = {name: value for name, value in trace.items() if name != "stages"}
    total = max(float(trace["total_latency_ms"]), 1e-9)
    rows = [(stage["name"], f"{stage['duration_ms']:.3f} ms", _bar(stage, total)) for stage in trace["stages"]]
    return Fields(facts), "", Table(("stage", "took", "when"), rows), ""


def _bar(stage: Mapping[str, Any], total: float) -> str:
    """A stage's place in the whole, as a bar; a stage too short for one mark shows as a thin one."""
    start = min(round(stage["start_ms"] / total * _BAR_WIDTH), _BAR_WIDTH - 1)
    width = min(round(stage["duration_ms"] / total * _BAR_WIDTH), _BAR_WIDTH - start)
    bar: str = " " * start + ("█" * width or "▏")
    return bar
