"""Erasure in Postgres: everything of an organization, in batches, until one audit event says that it was there."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from uuid import UUID

from ibex.domain.identity import OrgId
from ibex.errors import UnknownEntity
from ibex.stores.postgres.audit import AuditedStore
from ibex.stores.postgres.conflicts import despite_conflicts

_CHECKPOINTS, _SESSIONS, _ROWS, _AGENTS = 5000, 500, 500, 200
"""Rows of a batch."""
_PAUSE_SECONDS = 0.1
"""Between batches whose rows each leave a change, so that every process can follow."""
_ATTEMPTS = 10
"""At a batch that recorders stand in the way of: they lock a session and then its agent, and of agents the eraser must
lock them first."""


@dataclass(frozen=True, slots=True)
class ErasedRecords:
    """What was deleted of the record of an organization's turns."""

    checkpoints: int = 0
    sessions: int = 0

    def __add__(self, other: "ErasedRecords") -> "ErasedRecords":
        return ErasedRecords(self.checkpoints + other.checkpoints, self.sessions + other.sessions)


class OrganizationEraser(AuditedStore):
    """Erases organizations, as the owner. Each step can be taken again, and is then done with what was left."""

    async def begin(self, org_id: OrgId) -> bool:
        """Refuse every token of the organization from now on, for good.

        False when it was erased before, to the end. Raises UnknownEntity when it never was.
        """
        async with self._changing() as connection:
            is_there = await connection.fetchval(_BEGIN, org_id) is not None
            if is_there:
                await self._audit(connection, "set_status", "organization", org_id, org_id, status="erasing")
            elif not await connection.fetchval(_WAS_ERASED, org_id):
                raise UnknownEntity(f"There is no organization {org_id}.", hint="Check the id.")
        return is_there

    async def delete_records(self, org_id: OrgId) -> ErasedRecords:
        """Delete sessions and checkpoints. A recorder may add some until the agents are gone."""
        erased = ErasedRecords()
        while session_ids := await self._sessions_of(org_id):
            count = _CHECKPOINTS
            while count == _CHECKPOINTS:
                count = await _again(partial(self._delete_checkpoints, session_ids))
                erased += ErasedRecords(checkpoints=count)
            erased += await _again(partial(self._delete_sessions, session_ids))
        return erased

    async def delete_tenancy(self, org_id: OrgId) -> ErasedRecords:
        """Delete directives, limits, tokens, agents and users, and what recorders have added to the record meanwhile.

        From then on Postgres refuses every turn of the organization.
        """
        erased = ErasedRecords()
        for statement in _DELETE_OWNED:
            await self._in_batches(statement, org_id)
        count = _AGENTS
        while count == _AGENTS:
            count, late = await _again(partial(self._delete_agents, org_id))
            erased += late
            await asyncio.sleep(_PAUSE_SECONDS)
        await self._in_batches(_DELETE_USERS, org_id)
        return erased

    async def finish(self, org_id: OrgId) -> None:
        """Delete the organization, and its audit events but for one, which names it and nobody else."""
        await self._in_batches(_DELETE_AUDIT_EVENTS, org_id)
        async with self._changing() as connection:
            await connection.execute("delete from ibex_core.audit_events where org_id = $1", org_id)
            await connection.execute("delete from ibex_core.organizations where org_id = $1", org_id)
            await self._audit(connection, "erase", "organization", org_id, org_id)

    async def _sessions_of(self, org_id: OrgId) -> list[UUID]:
        async with self._postgres.transaction(timeout=15, operation="erase") as connection:
            rows = await connection.fetch(_SOME_SESSIONS, org_id, _SESSIONS)
        return [row["session_id"] for row in rows]

    async def _delete_checkpoints(self, session_ids: Sequence[UUID]) -> int:
        async with self._postgres.transaction(timeout=60, operation="erase") as connection:
            return _count(await connection.execute(_DELETE_SOME_CHECKPOINTS, session_ids, _CHECKPOINTS))

    async def _delete_sessions(self, session_ids: Sequence[UUID]) -> ErasedRecords:
        async with self._postgres.transaction(timeout=60, operation="erase") as connection:
            # Locked first: what a recorder adds meanwhile is seen by the statements after.
            await connection.execute(_LOCK_SESSIONS, session_ids)
            checkpoints = _count(await connection.execute(_DELETE_CHECKPOINTS, session_ids))
            return ErasedRecords(checkpoints, _count(await connection.execute(_DELETE_SESSIONS, session_ids)))

    async def _delete_agents(self, org_id: OrgId) -> tuple[int, ErasedRecords]:
        """Delete some agents, and all that was recorded of them; how many. Locked, they can be recorded no more."""
        async with self._postgres.transaction(timeout=60, operation="erase") as connection:
            rows = await connection.fetch(_LOCK_AGENTS, org_id, _AGENTS)
            agent_ids = [row["agent_id"] for row in rows]
            checkpoints = _count(await connection.execute(_DELETE_AGENTS_CHECKPOINTS, org_id, agent_ids))
            sessions = _count(await connection.execute(_DELETE_AGENTS_SESSIONS, org_id, agent_ids))
            await connection.execute("delete from ibex_core.agents where agent_id = any($1::uuid[])", agent_ids)
        return len(agent_ids), ErasedRecords(checkpoints, sessions)

    async def _in_batches(self, statement: str, org_id: OrgId) -> None:
        while await _again(partial(self._delete_some, statement, org_id)) == _ROWS:  # noqa: ASYNC110 - a pause, not a wait
            await asyncio.sleep(_PAUSE_SECONDS)

    async def _delete_some(self, statement: str, org_id: OrgId) -> int:
        async with self._postgres.transaction(timeout=60, operation="erase") as connection:
            return _count(await connection.execute(statement, org_id, _ROWS))


_again = partial(despite_conflicts, attempts=_ATTEMPTS)


def _count(status: str) -> int:
    """The rows of a command's status: `DELETE 12`."""
    return int(status.rpartition(" ")[2])


def _deletion(table: str) -> str:
    """The statement that deletes the organization $1's rows of a table, at most $2."""
    return (
        f"delete from ibex_core.{table} where ctid = any(array("  # noqa: S608 - own names only
        f"select ctid from ibex_core.{table} where org_id = $1 limit $2))"
    )


_BEGIN = "update ibex_core.organizations set status = 'erasing' where org_id = $1 returning org_id"

_WAS_ERASED = """
select exists (
    select from ibex_core.audit_events where org_id = $1 and entity_kind = 'organization' and action = 'erase'
)
"""

_SOME_SESSIONS = "select session_id from ibex_core.sessions where org_id = $1 limit $2"

_LOCK_SESSIONS = """
select from ibex_core.sessions where session_id = any($1::uuid[]) order by org_id, agent_id, external_id for update
"""
"""In the order in which recorders lock them."""

_DELETE_SOME_CHECKPOINTS = """
delete from ibex_core.checkpoints where turn_id = any(array(
    select turn_id from ibex_core.checkpoints where session_id = any($1::uuid[]) limit $2
))
"""

_DELETE_CHECKPOINTS = "delete from ibex_core.checkpoints where session_id = any($1::uuid[])"
_DELETE_SESSIONS = "delete from ibex_core.sessions where session_id = any($1::uuid[])"

_DELETE_OWNED = tuple(map(_deletion, ("directives", "directive_versions", "limits", "tokens")))
_DELETE_USERS = _deletion("users")
_DELETE_AUDIT_EVENTS = _deletion("audit_events")

_LOCK_AGENTS = "select agent_id from ibex_core.agents where org_id = $1 order by agent_id limit $2 for update"
_DELETE_AGENTS_SESSIONS = "delete from ibex_core.sessions where org_id = $1 and agent_id = any($2::uuid[])"
_DELETE_AGENTS_CHECKPOINTS = """
delete from ibex_core.checkpoints as c using ibex_core.sessions as s
where s.org_id = $1 and s.agent_id = any($2::uuid[]) and c.session_id = s.session_id
"""
