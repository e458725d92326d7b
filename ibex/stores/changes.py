"""What has changed since the last question: the feed every process asks each second, the truth of every revocation."""

import asyncio
from dataclasses import dataclass
from typing import Literal, NamedTuple
from uuid import UUID

import asyncpg

from ibex.stores.postgres import Postgres, translated
from ibex.stores.redis_subscription import boot_time

ChangeKind = Literal["organization", "user", "agent", "token", "limit", "directive"]

_FORGET_SECONDS = 24 * 3600.0
"""Half of how long changes are kept: after a longer silence some may have been pruned unseen."""


class Change(NamedTuple):
    """One thing that is no longer what it was."""

    kind: ChangeKind
    entity_id: UUID
    """The row's own id; of a limit the agent's or else the organization's, of a directive the agent's."""
    changed_at: float = 0.0
    """When it was written, shortly before its commit (Unix seconds of the database's clock)."""


@dataclass(frozen=True, slots=True)
class Changes:
    """One answer of the feed."""

    is_reset: bool
    """Everything remembered from before this answer may be wrong: empty the caches."""
    is_standby: bool
    """The server that answered is in recovery: it may be behind, and its answer is no sign that nothing changed."""
    rows: tuple[Change, ...]


_CURSOR = "select pg_snapshot_xmin(pg_current_snapshot())::text"

_POLL = """
with s as materialized (
    select pg_snapshot_xmin(pg_current_snapshot()) as xmin,
           pg_is_in_recovery() as is_standby,
           case when not pg_is_in_recovery() then left(pg_walfile_name(pg_current_wal_lsn()), 8) end as timeline
)
select s.xmin::text as cursor, s.is_standby, s.timeline, c.change_id, c.kind, c.entity_id,
    extract(epoch from c.changed_at)::float8 as changed_at
from s left join ibex_core.changes as c on c.xid >= $1::text::xid8
order by c.xid, c.change_id
"""


class ChangeFeed:
    """Asks for changes by transaction id, on a connection of its own.

    The cursor is the oldest transaction that was open at the last answer, since that one may still write a change; what
    newer ones wrote comes again until it ends, and is recognized by its id. A server with another history (restored,
    failed over) or a day without an answer is a reset.
    """

    def __init__(self, dsn: str, *, deadline: float = 1.0) -> None:
        self._dsn = dsn
        self._deadline = deadline
        self._connection: asyncpg.Connection[asyncpg.Record] | None = None
        self._cursor: int | None = None
        self._timeline: str | None = None
        self._seen: frozenset[int] = frozenset()
        self._answered_at = 0.0

    async def poll(self) -> Changes:
        """What has committed since the last answer, each change once; the first answer is a reset.

        Raises StoreUnavailable past the deadline, which covers connecting. Not to be called twice at a time.
        """
        try:
            with translated():
                async with asyncio.timeout(self._deadline):
                    is_start, rows = await self._ask()
        except BaseException:
            # The answer to a question given up may still come: never read it as the next one's.
            self._drop()
            raise
        return self._digest(is_start, rows)

    async def close(self) -> None:
        """Let go of the connection, without waiting for the server."""
        self._drop()

    async def _ask(self) -> tuple[bool, list[asyncpg.Record]]:
        connection = self._connection
        if connection is None or connection.is_closed():
            connection = self._connection = await asyncpg.connect(
                self._dsn, timeout=self._deadline, server_settings=_SESSION_SETTINGS
            )
        now = boot_time()
        is_start = self._cursor is None or now - self._answered_at > _FORGET_SECONDS
        cursor = await connection.fetchval(_CURSOR) if is_start else str(self._cursor)
        rows = await connection.fetch(_POLL, cursor)
        if not rows[0]["is_standby"]:
            self._answered_at = now
        return is_start, rows

    def _digest(self, is_start: bool, rows: list[asyncpg.Record]) -> Changes:
        first = rows[0]
        if first["is_standby"]:
            self._drop()  # the next question may reach the primary
            return Changes(is_reset=False, is_standby=True, rows=())
        cursor = int(first["cursor"])
        is_other = self._cursor is not None and (cursor < self._cursor or first["timeline"] != self._timeline)
        is_reset = is_start or is_other
        found = {row["change_id"]: _change(row) for row in rows if row["kind"] is not None}
        fresh = () if is_reset else tuple(change for key, change in found.items() if key not in self._seen)
        self._cursor, self._timeline, self._seen = cursor, first["timeline"], frozenset(found)
        return Changes(is_reset, is_standby=False, rows=fresh)

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None


def _change(row: asyncpg.Record) -> Change:
    return Change(row["kind"], row["entity_id"], row["changed_at"])


_SESSION_SETTINGS = {
    "application_name": "ibex change feed",
    # A generic plan guesses that a third of the table matches, and reads all of it.
    "plan_cache_mode": "force_custom_plan",
    "enable_seqscan": "off",
}


async def prune_changes(postgres: Postgres, *, batch: int = 5_000) -> int:
    """Delete the changes older than 48 h, `batch` a transaction; how many there were."""
    pruned = 0
    while True:
        async with postgres.transaction(operation="prune_changes") as connection:
            count = int(await connection.fetchval("select ibex_core.prune_changes($1)", batch))
        pruned += count
        if count < batch:
            return pruned
