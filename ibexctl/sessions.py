"""`ibexctl session`: conversations, and the checkpoint each turn of them left."""

from typing import TYPE_CHECKING, Annotated, Any, Literal
from uuid import UUID

import typer

from ibex.domain.identity import AgentId
from ibexctl import arguments
from ibexctl.command import command, group
from ibexctl.identity import AgentFilter, Limit, OrgFilter
from ibexctl.operation import operate
from ibexctl.output import Answer, Fields, Table

if TYPE_CHECKING:
    from ibex.runtime import Operator

app = group("Sessions: conversations, turn by turn.")

_COLUMNS = (
    "turn_index",
    "completed_at",
    "model",
    "input_tokens",
    "output_tokens",
    "is_complete",
    "latency_ms",
    "turn_id",
)
_LIST_COLUMNS = ("session", "org_id", "agent_id", "status", "turn_count", "created_at", "last_turn_at")


@command(app, "list", example="ibexctl session list --org acme --limit 20\nibexctl session list --status active")
def list_sessions(
    org: OrgFilter = None,
    agent: AgentFilter = None,
    status: Annotated[
        Literal["active", "abandoned"] | None, typer.Option("--status", help="Those in this state alone.")
    ] = None,
    limit: Limit = 50,
) -> Answer:
    """List sessions, the one with the latest turn first.

    A session is abandoned when it was idle for IBEX_SESSION_IDLE_MINUTES, until its next turn.
    """

    async def act(operator: "Operator") -> list[dict[str, Any]]:
        org_id = None if org is None else await operator.directory.find_org(org)
        agent_id = None if agent is None else AgentId(agent)
        return await operator.sessions.list_sessions(org_id, agent_id, status=status, limit=limit)

    found = operate(act)
    rows = [[row["external_id"], *(row[column] for column in _LIST_COLUMNS[1:])] for row in found]
    return Answer({"sessions": found}, (Table(_LIST_COLUMNS, rows, empty="No session yet."),))


@command(app, "show", example="ibexctl session show chat-42 --agent 00000000-0000-0000-0000-000000000003")
def show_session(
    external_id: Annotated[str, typer.Argument(metavar="SESSION", help="The session's id, as its client named it.")],
    agent: Annotated[
        UUID,
        typer.Option("--agent", metavar="AGENT", parser=arguments.identifier, help="The agent whose session it is."),
    ],
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="At most so many checkpoints. Else: all.")
    ] = None,
) -> Answer:
    """Show a session and its checkpoints, oldest first: one for each turn that brought a reply, or a part of one.

    turn_index counts from 0 without gaps. Texts are shown only where they were kept (IBEX_CAPTURE_CONTENT).
    """

    async def act(operator: "Operator") -> dict[str, Any]:
        return await operator.sessions.show(external_id, AgentId(agent), limit)

    found = operate(act)
    rows = [[checkpoint.get(column) for column in _COLUMNS] for checkpoint in found["checkpoints"]]
    return Answer(found, (Fields(found["session"]), "", Table(_COLUMNS, rows, empty="No checkpoint yet.")))
