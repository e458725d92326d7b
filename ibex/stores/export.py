"""Everything ibex keeps of one organization, row by row, in bounded memory; secrets and digests of tokens never."""

import json
from collections.abc import AsyncIterator, Mapping
from typing import NamedTuple

from ibex.domain.identity import OrgId
from ibex.stores.clickhouse.traces import TraceStore
from ibex.stores.postgres.audit import AuditedStore, Row, plain
from ibex.stores.postgres.pool import Postgres
from ibex.stores.postgres.session_statements import CONTENT

_ROWS_AT_ONCE = 500
_CHECKPOINTS_AT_ONCE = 10
"""Each may hold a prompt and a reply of many megabytes."""
_LONGEST_SECONDS = 6 * 3600.0

TRACES = "traces"
"""The one kind that comes from ClickHouse."""

QUERIES = {
    "organizations": "select org_id, name, status, created_at from ibex_core.organizations where org_id = $1",
    "users": "select * from ibex_core.users where org_id = $1 order by created_at, user_id",
    "agents": "select * from ibex_core.agents where org_id = $1 order by created_at, agent_id",
    "tokens": "select * from ibex_core.tokens where org_id = $1 order by created_at, token_id",
    "limits": "select * from ibex_core.limits where org_id = $1 order by created_at, limit_id",
    "directives": "select * from ibex_core.directives where org_id = $1 order by agent_id",
    "directive_versions": "select * from ibex_core.directive_versions where org_id = $1 order by agent_id, version",
    "sessions": "select * from ibex_core.sessions where org_id = $1 order by org_id, agent_id, external_id",
    "checkpoints": (
        "select c.* from ibex_core.sessions as s join ibex_core.checkpoints as c using (session_id)"
        " where s.org_id = $1 order by c.session_id, c.turn_index"
    ),
    "audit_events": "select * from ibex_core.audit_events where org_id = $1 order by created_at, audit_event_id",
}
"""A statement for each kind of row in Postgres."""

KINDS = (*QUERIES, TRACES)


class Exported(NamedTuple):
    """One row, and what kind of row it is."""

    kind: str
    row: Row


class ExportLog(AuditedStore):
    """Where it stays known, as the owner, what was given out."""

    async def note(self, org_id: OrgId, counts: Mapping[str, int], *, is_whole: bool) -> None:
        """Leave an audit event of an export: how many rows of each kind, and whether they are all there are."""
        async with self._changing() as connection:
            details = {"rows": {kind: count for kind, count in counts.items() if count}, "is_whole": is_whole}
            await self._audit(connection, "export", "organization", org_id, org_id, **details)


async def export_organization(postgres: Postgres, traces: TraceStore, org_id: OrgId) -> AsyncIterator[Exported]:
    """Yield every row of an organization, as the owner sees it, kind by kind; each kind as it is when it is read.

    Raises StoreUnavailable. The caller must read to the end, or close it.
    """
    for kind, query in QUERIES.items():
        prefetch = _CHECKPOINTS_AT_ONCE if kind == "checkpoints" else _ROWS_AT_ONCE
        # A transaction that only reads has no id: however long it takes, it holds no change back.
        async with postgres.transaction(timeout=_LONGEST_SECONDS, operation="export") as connection:
            async for record in connection.cursor(query, org_id, prefetch=prefetch):
                yield Exported(kind, _readable(plain(record, text=CONTENT)))
    async for trace in traces.scan(org_id):
        yield Exported(TRACES, trace)


def _readable(row: Row) -> Row:
    """With an event's details as an object."""
    if "details" in row:
        row["details"] = json.loads(row["details"])
    return row
