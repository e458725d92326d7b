"""The recorder's own memory, in SQLite beside the journal: what each sink has, what is under way, what was refused."""

import json
import logging
import sqlite3
import time
from collections.abc import Iterator, Sequence
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
    payload blob not null, put_aside_at real not null, is_replay_wanted integer not null default 0,
    unique (sink, segment, start)
) strict;
"""


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
            "insert into dead_letters (sink, segment, start, turn_id, reason, payload, put_aside_at)"
            " values (?, ?, ?, ?, ?, ?, ?) on conflict do nothing",
            [
                (sink, refusal.segment, refusal.start, str(refusal.turn_id) if refusal.turn_id else None,
                 refusal.reason, refusal.payload, time.time())
                for refusal in refusals
            ],
        )  # fmt: skip

    def count_dead_letters(self) -> int:
        """How many records are put aside."""
        return int(self._database.execute("select count(*) from dead_letters").fetchone()[0])

    def dead_letters(self, *, limit: int = 100) -> list[DeadLetter]:
        """Records put aside, oldest first."""
        return self._read_dead_letters("true order by dead_letter_id limit ?", (limit,))

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

    def drop_dead_letters(self, dead_letter_ids: Sequence[int]) -> int:
        """Delete dead letters for good; how many there were."""
        statement = "delete from dead_letters where dead_letter_id = ?"
        with self._transaction():
            return sum(self._database.execute(statement, (item,)).rowcount for item in dead_letter_ids)

    def _read_dead_letters(self, condition: str, parameters: tuple[object, ...]) -> list[DeadLetter]:
        columns = "dead_letter_id, sink, segment, start, turn_id, reason, payload, put_aside_at"
        rows = self._database.execute(f"select {columns} from dead_letters where {condition}", parameters)  # noqa: S608
        return [
            DeadLetter(number, sink, segment, start, UUID(turn_id) if turn_id else None, reason, payload, at)
            for number, sink, segment, start, turn_id, reason, payload, at in rows
        ]

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            with self._database:
                self._database.execute("begin immediate")
                yield
        except sqlite3.OperationalError as error:
            raise StoreUnavailable(f"The recorder's ledger cannot be written: {error}.") from error
