"""The recorder's own memory, in SQLite beside the journal: what each sink has, what is under way, what was refused."""

import json
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from uuid import UUID

from ibex.errors import StoreUnavailable

log = logging.getLogger("ibex.recorder")

DATABASE_NAME = "recorder.sqlite"
_LOG_PAGES = 64
_SCHEMA = """
create table if not exists marks (
    sink text, segment text, position integer not null, primary key (sink, segment)
) strict;
create table if not exists batches (sink text primary key, places text not null, recorded_at real not null) strict;
create table if not exists dead_letters (
    dead_letter_id integer primary key autoincrement,
    sink text not null, segment text not null, start integer not null, turn_id text, reason text not null,
    payload blob not null, put_aside_at real not null, is_replay_wanted integer not null default 0, org_id text,
    unique (sink, segment, start)
) strict;
"""
_ADDED = """
create index if not exists dead_letters_by_organization on dead_letters (org_id);
"""
"""What older ledgers get besides the column `org_id`: null is not known yet, empty is nobody's."""
_PAGE_LETTERS, _PAGE_BYTES = 200, 4 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """Part of a segment: the bytes from `start` to `stop`, which never change."""

    segment: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Batch:
    """What is sent to a sink at once. The places name its content, so their digest is its deduplication token."""

    places: tuple[Place, ...]
    recorded_at: float
    """Unix seconds."""

    @property
    def token(self) -> str:
        """The same for the same places, on every run."""
        names = ",".join(f"{place.segment}:{place.start}-{place.stop}" for place in self.places)
        return sha256(names.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A record a sink refused for its content, or that is no turn: put aside so that those behind it are delivered."""

    dead_letter_id: int
    sink: str
    segment: str
    start: int
    turn_id: UUID | None
    reason: str
    payload: bytes
    put_aside_at: float


@dataclass(frozen=True, slots=True)
class Refusal:
    """A dead letter to be."""

    segment: str
    start: int
    turn_id: UUID | None
    reason: str
    payload: bytes
    org_id: UUID | None = None
    """Whose it is, where that is known."""


class Ledger:
    """One file, mode 0600, written by the recorder; the command line may open it too, to show and replay dead letters.

    Its last commits may be lost with the power, and the file itself with the disk. Sinks are told which turns they may
    have had before, so that not even that delivers a turn twice.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / DATABASE_NAME
        try:
            self._database = self._connect()
        except sqlite3.OperationalError:
            raise  # locked, or no room: not damage
        except sqlite3.DatabaseError:
            log.exception("the recorder's ledger is damaged and begun anew")
            self._path.replace(self._path.with_suffix(f".damaged-{time.time_ns()}"))
            for suffix in ("-wal", "-shm"):
                Path(f"{self._path}{suffix}").unlink(missing_ok=True)
            self._database = self._connect()

    def _connect(self) -> sqlite3.Connection:
        self._path.touch(mode=0o600)
        database = sqlite3.connect(self._path, timeout=5.0, isolation_level=None)
        try:
            database.execute("pragma journal_mode = wal")
            database.execute("pragma synchronous = normal")
            database.execute("pragma secure_delete = on")  # a dead letter that is dropped may be an erased tenant's
            # By default the log grows to 4 MB and stays: more than a small journal may hold in all.
            database.execute(f"pragma wal_autocheckpoint = {_LOG_PAGES}")
            database.execute(f"pragma journal_size_limit = {_LOG_PAGES * 4096}")
            database.executescript(_SCHEMA)
            if "org_id" not in {row[1] for row in database.execute("pragma table_info(dead_letters)")}:
                database.execute("alter table dead_letters add column org_id text")
            database.executescript(_ADDED)
            if database.execute("pragma quick_check(1)").fetchone() != ("ok",):
                raise sqlite3.DatabaseError("quick_check failed")
        except sqlite3.DatabaseError:
            database.close()
            raise
        return database

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def marks(self, sink: str) -> dict[str, int]:
        """For each segment the place up to which the sink has everything."""
        return dict(self._database.execute("select segment, position from marks where sink = ?", (sink,)))

    def open_batch(self, sink: str) -> Batch | None:
        """The batch whose answer is not known: it must be sent again exactly as it was."""
        row = self._database.execute("select places, recorded_at from batches where sink = ?", (sink,)).fetchone()
        return None if row is None else Batch(tuple(Place(*item) for item in json.loads(row[0])), row[1])

    def begin(self, sink: str, batch: Batch) -> None:
        """Note a batch before it is sent. Raises StoreUnavailable when the disk is full."""
        places = json.dumps([(place.segment, place.start, place.stop) for place in batch.places])
        with self._transaction():
            self._database.execute("insert or replace into batches values (?, ?, ?)", (sink, places, batch.recorded_at))

    def finish(self, sink: str, batch: Batch, refusals: Sequence[Refusal]) -> None:
        """Note that the sink has the batch, but for what it refused: all in one transaction.

        Raises StoreUnavailable when the disk is full.
        """
        with self._transaction():
            self._database.executemany(
                "insert or replace into marks values (?, ?, ?)",
                [(sink, place.segment, place.stop) for place in batch.places],
            )
            self._put_aside(sink, refusals)
            self._database.execute("delete from batches where sink = ?", (sink,))

    def forget_segments(self, segments: Sequence[str]) -> None:
        """Drop the marks of segments that are no longer there."""
        with self._transaction():
            self._database.executemany("delete from marks where segment = ?", [(segment,) for segment in segments])

    def known_segments(self) -> set[str]:
        """Segments that have a mark."""
        return {row[0] for row in self._database.execute("select distinct segment from marks")}

    def _put_aside(self, sink: str, refusals: Sequence[Refusal]) -> None:
        self._database.executemany(
            "insert into dead_letters (sink, segment, start, turn_id, reason, payload, put_aside_at, org_id)"
            " values (?, ?, ?, ?, ?, ?, ?, ?) on conflict do nothing",
            [
                (sink, refusal.segment, refusal.start, str(refusal.turn_id) if refusal.turn_id else None,
                 refusal.reason, refusal.payload, time.time(), str(refusal.org_id) if refusal.org_id else None)
                for refusal in refusals
            ],
        )  # fmt: skip

    def count_dead_letters(self) -> int:
        """How many records are put aside."""
        return int(self._database.execute("select count(*) from dead_letters").fetchone()[0])

    def dead_letters(self, *, limit: int = 100, with_payloads: bool = True) -> list[DeadLetter]:
        """Records put aside, oldest first; without their payloads, which may be gigabytes, if they are not needed."""
        payload = "payload" if with_payloads else "x''"
        return self._read_dead_letters("true order by dead_letter_id limit ?", (limit,), payload)

    def want_replay(self, dead_letter_ids: Sequence[int] | None = None) -> int:
        """Ask the recorder to try these (None: all) once more; how many it will."""
        if dead_letter_ids is None:
            return self._database.execute("update dead_letters set is_replay_wanted = 1").rowcount
        with self._transaction():
            statement = "update dead_letters set is_replay_wanted = 1 where dead_letter_id = ?"
            return sum(self._database.execute(statement, (item,)).rowcount for item in dead_letter_ids)

    def wanted_replays(self, sink: str, *, limit: int = 100) -> list[DeadLetter]:
        """Dead letters of a sink that somebody asked to try once more."""
        return self._read_dead_letters("sink = ? and is_replay_wanted order by dead_letter_id limit ?", (sink, limit))

    def settle_replay(self, dead_letter_id: int, reason: str | None) -> None:
        """A replay's end: delivered (None), or refused again."""
        if reason is None:
            self._database.execute("delete from dead_letters where dead_letter_id = ?", (dead_letter_id,))
        else:
            self._database.execute(
                "update dead_letters set is_replay_wanted = 0, reason = ? where dead_letter_id = ?",
                (reason, dead_letter_id),
            )

    def learn_organizations(self, read: Callable[[bytes], UUID | None]) -> int:
        """Note whose some of the dead letters are of which that is not known yet; how many, 0 when all are known.

        Few enough, and small enough together, for an event loop to wait for it. Raises StoreUnavailable.
        """
        known: list[tuple[str, int]] = []
        size = 0
        with self._transaction():
            rows = self._database.execute(
                "select dead_letter_id, payload from dead_letters where org_id is null limit ?", (_PAGE_LETTERS,)
            )
            for number, payload in rows:
                org_id = read(payload)
                known.append((str(org_id) if org_id else "", number))
                size += len(payload)
                if size >= _PAGE_BYTES:
                    break
            rows.close()
            self._database.executemany("update dead_letters set org_id = ? where dead_letter_id = ?", known)
        return len(known)

    def dead_letter_organizations(self) -> set[UUID]:
        """Whose dead letters there are, as far as it is known. Raises StoreUnavailable."""
        with _translated():
            rows = self._database.execute("select distinct org_id from dead_letters where org_id > ''").fetchall()
        return {UUID(row[0]) for row in rows}

    def drop_dead_letters(self, org_id: UUID) -> int:
        """Delete some of an organization's dead letters for good; how many, 0 when there are no more.

        Few enough for an event loop to wait for it. Raises StoreUnavailable.
        """
        some = "select dead_letter_id from dead_letters where org_id = ? limit ?"
        with self._transaction():
            return self._database.execute(
                f"delete from dead_letters where dead_letter_id in ({some})",  # noqa: S608 - a constant
                (str(org_id), _PAGE_LETTERS),
            ).rowcount

    def _read_dead_letters(
        self, condition: str, parameters: tuple[object, ...], payload: str = "payload"
    ) -> list[DeadLetter]:
        columns = f"dead_letter_id, sink, segment, start, turn_id, reason, {payload}, put_aside_at"
        rows = self._database.execute(f"select {columns} from dead_letters where {condition}", parameters)  # noqa: S608
        return [
            DeadLetter(number, sink, segment, start, UUID(turn_id) if turn_id else None, reason, payload, at)
            for number, sink, segment, start, turn_id, reason, payload, at in rows
        ]

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with _translated(), self._database:
            self._database.execute("begin immediate")
            yield


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except sqlite3.DatabaseError as error:
        raise StoreUnavailable(f"The recorder's ledger cannot be read or written: {error}.") from error
