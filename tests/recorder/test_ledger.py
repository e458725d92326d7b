"""The ledger: a batch is the same after a restart, and a full disk or damage is survived."""

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from ibex.errors import StoreUnavailable
from ibex.recorder.ledger import DATABASE_NAME, Batch, Ledger, Place, Refusal

BATCH = Batch((Place("a", 64, 900), Place("b", 64, 128)), time.time())


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with closing(Ledger(tmp_path)) as ledger:
        yield ledger


def test_a_batch_under_way_is_the_same_after_a_restart(ledger: Ledger, tmp_path: Path) -> None:
    ledger.begin("clickhouse", BATCH)
    with closing(Ledger(tmp_path)) as successor:
        found = successor.open_batch("clickhouse")
        assert found == BATCH
        assert found.token == BATCH.token
        assert successor.open_batch("postgres") is None


def test_a_token_names_its_places() -> None:
    others = [
        Batch(BATCH.places[:1], BATCH.recorded_at),
        Batch(BATCH.places[::-1], BATCH.recorded_at),
        Batch((Place("a", 64, 901), BATCH.places[1]), BATCH.recorded_at),
    ]
    assert len({batch.token for batch in [BATCH, *others]}) == 4
    assert Batch(BATCH.places, 0.0).token == BATCH.token


def test_marks_are_each_sinks_own(ledger: Ledger) -> None:
    ledger.begin("clickhouse", BATCH)
    ledger.finish("clickhouse", BATCH, [])
    assert ledger.marks("clickhouse") == {"a": 900, "b": 128}
    assert ledger.marks("postgres") == {}
    assert ledger.open_batch("clickhouse") is None
    ledger.forget_segments(["a"])
    assert ledger.known_segments() == {"b"}


def test_its_files_stay_small_beside_the_smallest_journal(ledger: Ledger, tmp_path: Path) -> None:
    for number in range(600):
        batch = Batch((Place(f"segment {number}", 64, 900),), BATCH.recorded_at)
        ledger.begin("clickhouse", batch)
        ledger.finish("clickhouse", batch, [])
        ledger.forget_segments([f"segment {number}"])
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 512 << 10


def test_a_record_is_put_aside_once_for_each_sink(ledger: Ledger) -> None:
    refusal = Refusal("a", 64, None, "not a turn", b"payload")
    for _ in range(2):
        for sink in ("clickhouse", "postgres"):
            ledger.finish(sink, BATCH, [refusal])
    assert ledger.count_dead_letters() == 2
    (letter,) = [letter for letter in ledger.dead_letters() if letter.sink == "postgres"]
    assert (letter.payload, letter.turn_id) == (b"payload", None)


def test_a_full_disk_is_told_from_damage(ledger: Ledger, tmp_path: Path) -> None:
    ledger._database.execute("pragma max_page_count = 1")
    many = [Refusal("a", n, None, "not a turn", bytes(5000)) for n in range(20)]
    with pytest.raises(StoreUnavailable):
        ledger.finish("postgres", BATCH, many)
    assert ledger.marks("postgres") == {}, "all or nothing"
    with closing(Ledger(tmp_path)) as other:
        other.finish("postgres", BATCH, many)
    assert ledger.count_dead_letters() == 20


@pytest.mark.parametrize("damage", [b"no database at all" * 300, b""])
def test_a_damaged_file_is_begun_anew(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / DATABASE_NAME).write_bytes(damage)
    with closing(Ledger(tmp_path)) as ledger:
        ledger.begin("clickhouse", BATCH)
        assert ledger.open_batch("clickhouse") == BATCH
