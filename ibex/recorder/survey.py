"""A look at a journal from outside: what is there, what each store still lacks, what was set aside. Changes nothing."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from ibex.config import Settings
from ibex.domain.turns import Turn, decode_turn
from ibex.recorder.ledger import DATABASE_NAME, DeadLetter, Ledger
from ibex.recorder.spool import FIRST_POSITION
from ibex.stores.journal.room import JournalRoom, directory_size
from ibex.stores.journal.segments import SUFFIX, SegmentReader

SINKS = ("postgres", "clickhouse")
_READ_BYTES = 8 << 20


@dataclass(slots=True)
class Backlog:
    """What one store still lacks."""

    turns: list[Turn] = field(default_factory=list)

    @property
    def oldest_at(self) -> int | None:
        """When its oldest turn ended (Unix µs)."""
        return min((turn.completed_at for turn in self.turns), default=None)


@dataclass(slots=True)
class Survey:
    """A journal at one moment."""

    directory: Path
    size: int = 0
    """Bytes, of everything in the directory."""
    segments: int = 0
    growing_segments: int = 0
    """Those of them that a living worker still writes to."""
    unsupported_segments: int = 0
    """Those of a later version, which waits for that version."""
    pending: dict[str, Backlog] = field(default_factory=lambda: {sink: Backlog() for sink in SINKS})
    dead_letters: list[DeadLetter] = field(default_factory=list)
    """Without their payloads."""
    quarantined: list[Path] = field(default_factory=list)
    """Bytes that do not check, set aside in files of their own."""
    free_bytes: int = 0
    """Free on the journal's disk."""
    pressure: float = 0.0
    """How near the journal is to its bounds: from 0.8 on /ready says `degraded`, at 1 new chats are refused."""

    def count_dead_letters(self) -> Counter[str]:
        """How many turns each store has refused."""
        return Counter(letter.sink for letter in self.dead_letters)


def survey_journal(settings: Settings) -> Survey:
    """Look at the journal of this data directory, whether a server runs on it or not. Raises OSError."""
    directory = settings.journal_dir
    survey = Survey(directory)
    if not directory.is_dir():
        return survey
    marks: dict[str, dict[str, int]] = {sink: {} for sink in SINKS}
    if (directory / DATABASE_NAME).exists():
        with closing(Ledger(directory)) as ledger:
            # Marks before segments: a turn delivered meanwhile counts as pending, never the other way round.
            marks = {sink: ledger.marks(sink) for sink in SINKS}
            survey.dead_letters = ledger.dead_letters(limit=1_000_000, with_payloads=False)
    for path in sorted(directory.glob(f"*{SUFFIX}")):
        try:
            _add_segment(survey, SegmentReader(path), marks)
        except FileNotFoundError:  # delivered, and removed, this moment
            continue
    survey.quarantined = sorted(directory.glob("*.quarantine"))
    room = JournalRoom.of(settings)
    room.measure()
    disk = os.statvfs(directory)
    survey.size, survey.pressure = directory_size(directory), room.pressure
    survey.free_bytes = disk.f_bavail * disk.f_frsize
    return survey


def _add_segment(survey: Survey, reader: SegmentReader, marks: dict[str, dict[str, int]]) -> None:
    reader.size()
    survey.segments += 1
    survey.growing_segments += reader.final_size is None
    if not reader.is_supported:
        survey.unsupported_segments += 1
        return
    positions = {sink: marks[sink].get(reader.segment, FIRST_POSITION) for sink in SINKS}
    for start, turn in _turns(reader, min(positions.values())):
        for sink, position in positions.items():
            if start >= position and (turn.has_checkpoint or sink != "postgres"):
                survey.pending[sink].turns.append(turn)


def _turns(reader: SegmentReader, start: int) -> Iterator[tuple[int, Turn]]:
    while True:
        extract = reader.read(start, limit=_READ_BYTES)
        for record in extract.records:
            try:
                yield record.start, decode_turn(record.payload)
            except ValueError:
                continue
        if extract.stop == start:
            return
        start = extract.stop
