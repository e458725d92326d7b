"""What the reader of a segment makes of torn tails, flipped bytes and strange headers."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from ibex.domain.turns import encode_turn
from ibex.stores.journal.segment_writer import SegmentWriter
from ibex.stores.journal.segments import HEADER_SIZE, SegmentReader, encode_record
from ibex.stores.journal.writer import Journal
from tests.journals import read_all, readers, write_segment
from tests.turns import make_turn

OpenJournal = Callable[..., Journal]


def test_a_torn_tail_is_waited_for_while_its_writer_lives(tmp_path: Path) -> None:
    record = encode_record(encode_turn(make_turn()))
    writer = SegmentWriter.create(tmp_path, "worker-0")
    reader = readers(tmp_path)[0]
    writer.append([record, record[:30]])
    assert [len(part) for part in read_all(reader)] == [1, 0]
    writer.append([record[30:]])
    assert [len(part) for part in read_all(reader)] == [2, 0]
    writer.close()


def test_a_torn_tail_is_set_aside_when_its_writer_is_gone(tmp_path: Path) -> None:
    path = write_segment(tmp_path, [make_turn(), make_turn()], tail=b"\xc1\xf5ib\xff\x00\x00\x00torn")
    turns, unreadable = read_all(SegmentReader(path))
    assert len(turns) == 2
    assert [stop - start for start, stop in unreadable] == [12]


@pytest.mark.parametrize("limit", [1, 100, 1000, 1 << 20])
def test_every_record_but_the_flipped_one_is_read(tmp_path: Path, limit: int) -> None:
    written = [make_turn(external_id=f"s-{n}") for n in range(200)]
    path = write_segment(tmp_path, written)
    data = bytearray(path.read_bytes())
    record_size = (len(data) - HEADER_SIZE) // 200
    random.seed(7)
    for _ in range(10):
        broken = bytearray(data)
        at = random.randrange(HEADER_SIZE, len(data))
        broken[at] ^= 1 << random.randrange(8)
        path.write_bytes(broken)
        turns, unreadable = read_all(SegmentReader(path), limit=limit)
        assert len(turns) == 199
        assert all(turn in written for turn in turns)
        assert len(unreadable) == 1
        assert unreadable[0][0] <= at < unreadable[0][1]
        assert unreadable[0][1] - unreadable[0][0] < record_size + 10


def test_a_damaged_header_costs_no_turn(tmp_path: Path) -> None:
    path = write_segment(tmp_path, [make_turn()])
    data = bytearray(path.read_bytes())
    data[12] ^= 1
    path.write_bytes(data)
    reader = SegmentReader(path)
    assert reader.is_supported
    assert len(read_all(reader)[0]) == 1


def test_a_segment_of_a_later_version_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ibex.stores.journal.segments.FORMAT_VERSION", 2)
    path = write_segment(tmp_path, [make_turn()])
    monkeypatch.undo()
    assert not SegmentReader(path).is_supported


def test_a_place_reads_the_same_again(tmp_path: Path) -> None:
    path = write_segment(tmp_path, [make_turn() for _ in range(50)], tail=b"torn")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    reader = SegmentReader(path)
    first = reader.read(HEADER_SIZE)
    again = reader.read(HEADER_SIZE, stop=first.stop)
    assert (again.records, again.unreadable, again.stop) == (first.records, first.unreadable, first.stop)


def test_a_record_larger_than_the_window_is_read(tmp_path: Path) -> None:
    path = write_segment(tmp_path, [make_turn(), make_turn(messages=b"x" * (3 << 20)), make_turn()])
    assert len(read_all(SegmentReader(path))[0]) == 3
