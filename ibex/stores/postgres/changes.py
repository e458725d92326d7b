"""What has changed since the last question: the feed every process asks each second, the truth of every revocation."""

import asyncio
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, NamedTuple
from uuid import UUID

import asyncpg

from ibex.stores.postgres.address import PostgresAddress
from ibex.stores.postgres.pool import Postgres, translated
from ibex.stores.redis.subscription import boot_time

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


_START = """
select pg_snapshot_xmin(pg_current_snapshot())::text as xmin, c.change_id, c.xid::text as xid, c.changed_at
from (select) as one left join lateral (
    select * from ibex_core.changes order by xid desc, change_id desc limit 1
) as c on true
"""

_POLL = """
with s as materialized (
    select pg_snapshot_xmin(pg_current_snapshot()) as xmin,
           pg_is_in_recovery() as is_standby,
           case when not pg_is_in_recovery() then concat_ws(
               '/', left(pg_walfile_name(pg_current_wal_lsn()), 8),
               (select oid from pg_database where datname = current_database()), 'ibex_core.changes'::regclass::oid
           ) end as timeline,
           $2::bigint is null or $3::timestamptz < clock_timestamp() - interval '47 hours' or exists (
               select from ibex_core.changes where change_id = $2 and changed_at = $3
           ) as has_newest
)
select s.xmin::text as xmin, s.is_standby, s.timeline, s.has_newest,
    c.change_id, c.xid::text as xid, c.kind, c.entity_id, c.changed_at
from s left join ibex_core.changes as c on c.xid >= $1::text::xid8
order by c.xid, c.change_id
"""


class _Newest(NamedTuple):
    """The change with the greatest transaction id that was seen; what was seen is on the disk."""

    change_id: int
    xid: int
    changed_at: datetime


@dataclass(frozen=True, slots=True)
class _Position:
    """What has been told, and in which history."""

    xmin: int
    """The oldest transaction that was open at the last answer."""
    newest: _Newest | None
    """None while there is no change at all."""
    timeline: str | None = None
    """The server's timeline, and the ids of database and table: those of a dump that was restored are new."""
    seen: frozenset[int] = frozenset()
    """The changes from the cursor on that have been told."""

    @property
    def cursor(self) -> int:
        """The least transaction id that a change not yet told may have.

        That is not always `xmin`: a server that crashes forgets the ids of transactions that left nothing behind, and
        gives them again. It never gives one up to the newest change's again.
        """
        return min(self.xmin, self.newest.xid + 1 if self.newest else 0)


class ChangeFeed:
    """Asks for changes by transaction id, on a connection of its own.

    What is asked for begins with the oldest transaction that was open at the last answer, since that one may still
    write a change; what newer ones wrote comes again until it ends, and is recognized by its id. A server with another
    history (restored, failed over) or a day without an answer is a reset; a crash of the server is none.
    """

    def __init__(self, dsn: str, *, deadline: float = 1.0) -> None:
        self._address = PostgresAddress.parse(dsn)
        self._deadline = deadline
        self._connection: asyncpg.Connection[asyncpg.Record] | None = None
        self._position: _Position | None = None
        self._answered_at = 0.0

    async def poll(self) -> Changes:
        """What has committed since the last answer, each change once; the first answer is a reset.

        Raises StoreUnavailable past the deadline, which covers connecting. Not to be called twice at a time.
        """
        try:
            with translated():
                async with asyncio.timeout(self._deadline):
                    return await self._ask()
        except BaseException:
            # The answer to a question given up may still come: never read it as the next one's.
            self._drop()
            raise

    async def close(self) -> None:
        """Let go of the connection, without waiting for the server."""
        self._drop()

    async def _ask(self) -> Changes:
        connection = self._connection
        if connection is None or connection.is_closed():
            connection = self._connection = await asyncpg.connect(
                self._address.dsn, timeout=self._deadline, server_settings=_SESSION_SETTINGS, **self._address.options
            )
        now = boot_time()
        position = None if now - self._answered_at > _FORGET_SECONDS else self._position
        is_reset = position is None
        await connection.execute(_TRANSACTION)
        if position is not None:
            rows = await _fetch(connection, position)
            is_reset = _is_another_history(rows[0], position)
        if position is None or is_reset:
            position = await _begin(connection)
            rows = await _fetch(connection, position)
        await connection.execute("commit")
        if rows[0]["is_standby"]:
            self._drop()  # the next question may reach the primary
            return Changes(is_reset=False, is_standby=True, rows=())
        self._answered_at = now
        found = [row for row in rows if row["change_id"] is not None]
        self._position = _move(position, rows[0], found)
        fresh = () if is_reset else tuple(_change(row) for row in found if row["change_id"] not in position.seen)
        return Changes(is_reset, is_standby=False, rows=fresh)

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None


async def _begin(connection: "asyncpg.Connection[asyncpg.Record]") -> _Position:
    """The position of somebody who remembers nothing: all that there is counts as told."""
    row = await connection.fetchrow(_START)
    assert row is not None  # noqa: S101
    newest = None if row["xid"] is None else _newest(row)
    return _Position(int(row["xmin"]), newest)


async def _fetch(connection: "asyncpg.Connection[asyncpg.Record]", position: _Position) -> list[asyncpg.Record]:
    newest = position.newest
    return await connection.fetch(
        _POLL, str(position.cursor), newest and newest.change_id, newest and newest.changed_at
    )


def _is_another_history(first: asyncpg.Record, position: _Position) -> bool:
    """Whether the server that answered has lost what was seen, or was never where it was seen.

    A newest change of 47 hours ago may have been pruned, so that its absence says nothing.
    """
    if first["is_standby"]:
        return False
    is_behind = int(first["xmin"]) < position.cursor
    return is_behind or first["timeline"] != position.timeline or not first["has_newest"]


def _move(position: _Position, first: asyncpg.Record, found: list[asyncpg.Record]) -> _Position:
    newest = position.newest
    if found and (newest is None or int(found[-1]["xid"]) >= newest.xid):
        newest = _newest(found[-1])
    return _Position(int(first["xmin"]), newest, first["timeline"], frozenset(row["change_id"] for row in found))


def _newest(row: asyncpg.Record) -> _Newest:
    return _Newest(row["change_id"], int(row["xid"]), row["changed_at"])


def _change(row: asyncpg.Record) -> Change:
    return Change(row["kind"], row["entity_id"], row["changed_at"].timestamp())


_SESSION_SETTINGS = {"application_name": "ibex change feed"}

# Settings and questions in one transaction: behind a pooler the next may have another connection. A generic plan
# guesses that a third of the table matches, and reads all of it.
_TRANSACTION = """
begin isolation level read committed read only;
set local plan_cache_mode = force_custom_plan;
set local enable_seqscan = off
"""


async def prune_changes(postgres: Postgres, *, batch: int = 5_000) -> int:
    """Delete the changes older than 48 h, `batch` a transaction; how many there were."""
    pruned = 0
    while True:
        async with postgres.transaction(operation="prune_changes") as connection:
            count = int(await connection.fetchval("select ibex_core.prune_changes($1)", batch))
        pruned += count
        if count < batch:
            return pruned
