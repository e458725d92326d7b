"""`ibexctl audit`: who changed what, and when."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ibexctl.command import command, group
from ibexctl.identity import Limit, OrgFilter
from ibexctl.operation import operate
from ibexctl.output import Answer, Table

if TYPE_CHECKING:
    from ibex.runtime import Operator

app = group("Audit events: who changed what, and when.")

_COLUMNS = ("created_at", "actor", "action", "entity_kind", "entity_id", "org_id", "details")


Kind = Literal["organization", "user", "agent", "token", "limit", "directive"]


@command(app, "list", example="ibexctl audit list --org acme --limit 20\nibexctl audit list --kind token")
def list_events(
    org: OrgFilter = None,
    kind: Annotated[Kind | None, typer.Option("--kind", help="What happened to things of this kind alone.")] = None,
    limit: Limit = 50,
) -> Answer:
    """List what operators, and tokens that mint, changed, newest first.

    An event is written in the transaction of its change. It never holds a secret or a text.
    """

    async def act(operator: "Operator") -> list[dict[str, Any]]:
        org_id = None if org is None else await operator.directory.find_org(org)
        return await operator.directory.list_audit_events(org_id, limit, kind=kind)

    events = operate(act)
    rows = [[event[column] for column in _COLUMNS] for event in events]
    return Answer({"audit_events": events}, (Table(_COLUMNS, rows, empty="Nothing was changed yet."),))
