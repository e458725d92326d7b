"""Journals of tests: written, and read back, without a recorder."""

import stat
from pathlib import Path

from ibex.domain.turns import Turn, decode_turn, encode_turn
from ibex.stores.journal.segment_writer import SegmentWriter
from ibex.stores.journal.segments import HEADER_SIZE, SegmentReader, encode_record


def readers(directory: Path) -> list[SegmentReader]:
    return [SegmentReader(path) for path in sorted(directory.glob("*.segment"))]


def read_all(reader: SegmentReader, *, limit: int = 1 << 20) -> tuple[list[Turn], list[tuple[int, int]]]:
    """Every turn that can be had now, and the places set aside."""
    turns, unreadable, position = [], [], HEADER_SIZE
    while (extract := reader.read(position, limit=limit)).stop > position:
        turns += [decode_turn(record.payload) for record in extract.records]
        unreadable += extract.unreadable
        position = extract.stop
    return turns, unreadable


def read_journal(directory: Path) -> list[Turn]:
    return [turn for reader in readers(directory) for turn in read_all(reader)[0]]


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def files_of(directory: Path, pattern: str) -> list[Path]:
    return sorted(directory.glob(pattern))


def write_segment(directory: Path, turns: list[Turn], tail: bytes = b"") -> Path:
    """A segment of a writer that has gone."""
    writer = SegmentWriter.create(directory, "worker-0")
    writer.append([encode_record(encode_turn(turn)) for turn in turns])
    if tail:
        writer.append([tail])
    writer.close()
    return writer.path
