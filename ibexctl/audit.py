"""`ibexctl audit`: who changed what, and when."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ibexctl.command import command, group
from ibexctl.identity import OrgFilter, listing
from ibexctl.operation import operate
from ibexctl.output import Answer

if TYPE_CHECKING:
    from ibex.runtime import Operator

app = group("Audit events: who changed what, and when.")

_COLUMNS = ("created_at", "actor", "action", "entity_kind", "entity_id", "org_id", "details")


@command(app, "list", example="ibexctl audit list --org acme --limit 20")
def list_events(
    org: OrgFilter = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=10_000, help="At most so many.")] = 50,
) -> Answer:
    """List what operators changed, newest first."""

    async def act(operator: "Operator") -> list[dict[str, Any]]:
        org_id = None if org is None else await operator.directory.find_org(org)
        return await operator.directory.list_audit_events(org_id, limit)

    return listing("audit_events", _COLUMNS, operate(act))
