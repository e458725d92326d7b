"""Sessions and checkpoints: recorded in batches, each turn once, with indexes that have neither gaps nor doubles."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import asyncpg

from ibex.domain.identity import AgentId, OrgId
from ibex.domain.turns import Turn
from ibex.errors import StoreRefused, UnknownEntity
from ibex.stores.postgres.audit import Row, plain
from ibex.stores.postgres.conflicts import despite_conflicts
from ibex.stores.postgres.pool import Postgres, is_content_error
from ibex.stores.postgres.session_statements import (
    ABANDON,
    CONTENT,
    INSERT_CHECKPOINTS,
    KNOWN_PARENTS,
    LIST_SESSIONS,
    PRUNE_CHECKPOINTS,
    SHOW_CHECKPOINTS,
    SHOW_SESSION,
    UPSERT_SESSIONS,
    checkpoint_columns,
    session_columns,
)
from ibex.stores.tallies import FIND_CHECKPOINTS, TALLY_CHECKPOINTS, Period, StoredTurn, StoredTurns, Tallies, Tally

MAX_BATCH = 1000
"""The most turns of one transaction."""

ORGANIZATION_GONE = "organization_gone"
AGENT_GONE = "agent_gone"
"""Reasons for which a turn is refused because its organization or its agent does not exist (any more)."""


@dataclass(slots=True)
class RecordResult:
    """What became of a batch: every turn was written, was there before, or is refused."""

    written: int = 0
    duplicates: int = 0
    refused: list[tuple[Turn, str]] = field(default_factory=list)
    """With a reason that quotes nothing of the turn: ORGANIZATION_GONE, AGENT_GONE, or the name of the fault."""
    sessions_created: int = 0
    sessions_found: int = 0


class Expired(NamedTuple):
    """What one batch of retention deleted."""

    checkpoints: int
    sessions: int
    """Those of which nothing was left."""
    passed_over: int = 0
    """Sessions with old checkpoints that somebody else, most likely a recorder, held at that moment."""


class SessionStore:
    """Keeps sessions and checkpoints: the recorder writes in the application's role, operators read as the owner."""

    def __init__(self, postgres: Postgres) -> None:
        self._postgres = postgres

    async def record(self, turns: Sequence[Turn]) -> RecordResult:
        """Write the checkpoints of turns of any organizations, and their sessions.

        A turn that was recorded before stays as it is. One that is refused for its content is set apart, and keeps none
        of the others back. Raises StoreUnavailable when the batch, or the rest of it, must be tried again, which is
        always safe, and StoreRefused when Postgres refuses the statement itself.
        """
        result = RecordResult()
        batches = deque(list(turns[start : start + MAX_BATCH]) for start in range(0, len(turns), MAX_BATCH))
        while batches:
            batch = batches.popleft()
            try:
                await self._record_batch(batch, result)
            except _ContentRefused as refusal:
                batches.extendleft(reversed(await self._separate(batch, refusal, result)))
        return result

    async def abandon_idle(self, idle: timedelta, *, batch: int = 1000) -> int:
        """Mark the active sessions whose last turn ended longer ago than `idle`; how many there were."""
        async with self._postgres.transaction(operation="list_org_ids") as connection:
            org_ids = [OrgId(row[0]) for row in await connection.fetch("select ibex_core.list_org_ids()")]
        marked = 0
        for start in range(0, len(org_ids), _ORGANIZATIONS_AT_ONCE):
            some = org_ids[start : start + _ORGANIZATIONS_AT_ONCE]
            count = batch
            while count == batch:
                async with self._postgres.transaction(org_ids=some, operation="abandon_sessions") as connection:
                    count = len(await connection.fetch(ABANDON, idle, batch))
                marked += count
        return marked

    async def expire(self, age: timedelta, *, batch: int = 1000, now: datetime | None = None) -> Expired | None:
        """Delete about `batch` of the oldest checkpoints, of those recorded longer ago than `age` or the least age.

        Of a session its beginning goes; one of which nothing is left goes too. None while another node is at it. Raises
        StoreRefused when Postgres' clock and this node's (`now`) are more than an hour apart: by a clock that jumped
        everything is old.
        """
        async with self._postgres.transaction(timeout=15, operation="expire_checkpoints") as connection:
            if not await connection.fetchval("select pg_try_advisory_xact_lock($1)", _RETENTION_LOCK):
                return None
            apart = abs(await connection.fetchval("select clock_timestamp()") - (now or datetime.now(UTC)))
            if apart > _FARTHEST_APART:
                raise StoreRefused(
                    f"Postgres' clock and this node's are {apart} apart: by one of them young checkpoints are old."
                )
            row = await connection.fetchrow(PRUNE_CHECKPOINTS, age, batch)
        assert row is not None  # noqa: S101 (a function that answers one row)
        return Expired(**row)

    async def show(self, external_id: str, agent_id: AgentId, limit: int | None = None) -> dict[str, Any]:
        """A `session` and its `checkpoints`, oldest first, all of them unless limited. Raises UnknownEntity."""
        async with self._postgres.transaction(timeout=30, operation="show_session") as connection:
            session = await connection.fetchrow(SHOW_SESSION, agent_id, external_id)
            if session is None:
                raise UnknownEntity(
                    f"Agent {agent_id} has no session of this name.",
                    hint="A turn is recorded within a second of its end; `ibexctl trace list` shows the latest.",
                )
            rows = await connection.fetch(SHOW_CHECKPOINTS, session["session_id"], limit)
        return {"session": plain(session), "checkpoints": [_present(row) for row in rows]}

    async def list_sessions(
        self,
        org_id: OrgId | None = None,
        agent_id: AgentId | None = None,
        *,
        status: str | None = None,
        limit: int = 50,
    ) -> list[Row]:
        """Sessions, the one with the latest turn first; of one organization, one agent, in one state."""
        async with self._postgres.transaction(timeout=30, operation="list_sessions") as connection:
            rows = await connection.fetch(LIST_SESSIONS, org_id, agent_id, status, limit)
        return [plain(row) for row in rows]

    async def tally(self, period: Period) -> Tallies:
        """Every organization's checkpoints, minute by minute, as the owner sees them."""
        async with self._postgres.transaction(timeout=60, operation="tally_checkpoints") as connection:
            return [Tally(**row) for row in await connection.fetch(TALLY_CHECKPOINTS, period.since, period.until)]

    async def find_turns(self, org_id: OrgId, period: Period) -> StoredTurns:
        """The checkpoints of an organization one by one, as the owner sees them."""
        async with self._postgres.transaction(timeout=30, operation="find_checkpoints") as connection:
            rows = await connection.fetch(FIND_CHECKPOINTS, org_id, period.since, period.until)
        return [StoredTurn(**row) for row in rows]

    async def _record_batch(self, batch: list[Turn], result: RecordResult) -> None:
        sessions, written = await despite_conflicts(lambda: self._write(batch))
        result.written += written
        result.duplicates += len(batch) - written
        result.sessions_created += sum(is_new for is_new in sessions)
        result.sessions_found += sum(not is_new for is_new in sessions)

    async def _write(self, batch: list[Turn]) -> tuple[list[bool], int]:
        """Two statements: the first locks the sessions in key order; the second's snapshot is newer than the locks, so
        that it sees every checkpoint another recorder wrote, can tell what is new, and counts on from there.
        """
        if not batch:
            return [], 0
        async with self._postgres.transaction(
            org_ids={OrgId(turn.org_id) for turn in batch}, timeout=15, operation="record_turns"
        ) as connection:
            with _content_told_apart():
                sessions = await connection.fetch(UPSERT_SESSIONS, *session_columns(batch))
                rows = await connection.fetch(INSERT_CHECKPOINTS, *checkpoint_columns(batch))
        return [row["is_new"] for row in sessions], len(rows)

    async def _separate(self, batch: list[Turn], refusal: "_ContentRefused", result: RecordResult) -> list[list[Turn]]:
        """Set apart what is certainly refused, and answer the smaller batches to try, in order."""
        if refusal.is_parent_missing:
            gone = await self._find_orphans(batch)
            if gone:
                result.refused += [(turn, gone[index]) for index, turn in enumerate(batch) if index in gone]
                return [[turn for index, turn in enumerate(batch) if index not in gone]]
        if len(batch) == 1:
            result.refused.append((batch[0], refusal.reason))
            return []
        middle = len(batch) // 2
        return [batch[:middle], batch[middle:]]

    async def _find_orphans(self, batch: list[Turn]) -> dict[int, str]:
        """Which turns (by their place in the batch) have no agent any more, and why."""
        org_ids = [OrgId(turn.org_id) for turn in batch]
        async with self._postgres.transaction(org_ids=set(org_ids), operation="find_orphans") as connection:
            rows = await connection.fetch(KNOWN_PARENTS, org_ids, [turn.agent_id for turn in batch])
        return {
            row["place"] - 1: AGENT_GONE if row["has_org"] else ORGANIZATION_GONE
            for row in rows
            if not row["has_agent"]
        }


_ORGANIZATIONS_AT_ONCE = 500

_RETENTION_LOCK = 0x1BE8_A6ED
"""The advisory lock of the node that deletes old checkpoints."""

_FARTHEST_APART = timedelta(hours=1)
"""Clocks that are not set by hand stay within seconds of each other."""


class _ContentRefused(StoreRefused):
    """Something in this batch cannot be stored, whoever tries."""

    def __init__(self, error: Exception) -> None:
        super().__init__("Postgres refused a turn for its content.")
        constraint = getattr(error, "constraint_name", None)
        self.reason = f"{type(error).__name__} {constraint}" if constraint else type(error).__name__
        self.is_parent_missing = isinstance(error, asyncpg.ForeignKeyViolationError)


@contextmanager
def _content_told_apart() -> Iterator[None]:
    try:
        yield
    except (asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        if is_content_error(error):
            raise _ContentRefused(error) from None
        raise


def _present(checkpoint: asyncpg.Record) -> Row:
    """With captured content as text, absent where it was not captured."""
    row = plain(checkpoint, text=CONTENT)
    return {name: value for name, value in row.items() if value is not None or name not in CONTENT}
