"""The journal: what was acknowledged is read back, whatever happened to the writer or the bytes."""

import asyncio
import fcntl
import os
import random
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from uuid import UUID

import pytest

from ibex.errors import ServiceDegraded, StoreRefused, StoreUnavailable
from ibex.stores.journal.nudges import NudgeListener
from ibex.stores.journal.segment_writer import SegmentWriter
from ibex.stores.journal.segments import HEADER_SIZE
from ibex.stores.journal.writer import Journal
from tests.journals import files_of, mode_of, read_all, read_journal, readers
from tests.turns import make_turn
from tests.waiting import eventually

OpenJournal = Callable[..., Journal]


@pytest.fixture
async def open_journal(tmp_path: Path) -> AsyncIterator[OpenJournal]:
    """Open journals on `tmp_path`; closed at the end."""
    journals = []

    def open_one(**options: object) -> Journal:
        journal = Journal(tmp_path, **{"writer": "worker-0", "min_free_bytes": 0, **options})  # type: ignore[arg-type]
        journal.open()
        journals.append(journal)
        return journal

    yield open_one
    for journal in journals:
        await journal.close()


async def test_a_turn_is_readable_when_its_future_is_done(open_journal: OpenJournal, tmp_path: Path) -> None:
    turn = make_turn(model="modèle", messages=b"\x00\xc1\xf5ib" * 10)
    await open_journal().record(turn)
    assert read_journal(tmp_path) == [turn]


async def test_the_turns_of_one_tick_share_one_write(
    open_journal: OpenJournal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = open_journal()
    sizes = []
    write = os.write
    monkeypatch.setattr(
        "ibex.stores.journal.segment_writer.os.write", lambda fd, data: sizes.append(len(data)) or write(fd, data)
    )
    futures = [journal.record(make_turn()) for _ in range(20)]
    assert not any(future.done() for future in futures)
    await asyncio.sleep(0)
    assert all(future.done() for future in futures)
    assert len(sizes) == 1
    assert len(read_journal(tmp_path)) == 20


async def test_files_are_for_their_owner_alone(open_journal: OpenJournal, tmp_path: Path) -> None:
    open_journal()
    assert mode_of(tmp_path) == 0o700
    assert [mode_of(reader.path) for reader in readers(tmp_path)] == [0o600]


async def test_a_full_segment_is_let_go_of_and_the_next_begun(open_journal: OpenJournal, tmp_path: Path) -> None:
    journal = open_journal(segment_bytes=4096)
    for _ in range(40):
        await journal.record(make_turn())
    await journal.close()
    assert len(readers(tmp_path)) > 2
    assert len(read_journal(tmp_path)) == 40


async def test_an_idle_segment_is_let_go_of_once_it_has_turns(open_journal: OpenJournal, tmp_path: Path) -> None:
    journal = open_journal(segment_seconds=0.05)
    await asyncio.sleep(0.2)
    assert len(readers(tmp_path)) == 1, "a segment without turns is kept"
    await journal.record(make_turn())
    first = readers(tmp_path)[0]
    await eventually(lambda: first.size() and first.final_size is not None)
    assert len(read_all(first)[0]) == 1


async def test_full_sync_holds_the_replies_and_not_the_loop(
    open_journal: OpenJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = open_journal(sync="full")
    synced = os.fdatasync

    def slow_sync(fd: int) -> None:
        time.sleep(0.2)
        synced(fd)

    monkeypatch.setattr("ibex.stores.journal.segment_writer.os.fdatasync", slow_sync)
    future = journal.record(make_turn())
    rounds = 0
    while not future.done():
        await asyncio.sleep(0.001)
        rounds += 1
    assert rounds > 20


async def test_a_failed_sync_fails_the_turns_it_covers(
    open_journal: OpenJournal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = open_journal(sync="full")

    def broken_sync(fd: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr("ibex.stores.journal.segment_writer.os.fdatasync", broken_sync)
        with pytest.raises(StoreUnavailable):
            await journal.record(make_turn())
    await journal.record(make_turn())
    journal.check_room()
    assert len(readers(tmp_path)) == 2, "nothing follows a failed sync in its segment"


async def test_a_journal_that_failed_once_takes_turns_again_though_nobody_writes(open_journal: OpenJournal) -> None:
    """While it fails chats are refused, so no turn comes that could show that it has recovered."""
    journal = open_journal()
    journal._report_failure(OSError(5, "Input/output error"))
    with pytest.raises(ServiceDegraded):
        journal.check_room()

    await eventually(lambda: journal.pressure < 1.0)

    await journal.record(make_turn())


async def test_a_closed_journal_refuses_turns(open_journal: OpenJournal) -> None:
    journal = open_journal()
    await journal.close()
    with pytest.raises(StoreUnavailable):
        await journal.record(make_turn())


async def test_a_turn_that_cannot_be_encoded_is_refused_alone(open_journal: OpenJournal, tmp_path: Path) -> None:
    journal = open_journal()
    bad, good = journal.record(make_turn(model="\ud800")), journal.record(make_turn())
    with pytest.raises(StoreRefused):
        await bad
    await good
    assert len(read_journal(tmp_path)) == 1


async def test_a_reply_that_nobody_waits_for_any_more_is_no_trouble(open_journal: OpenJournal, tmp_path: Path) -> None:
    journal = open_journal()
    first, second = journal.record(make_turn()), journal.record(make_turn())
    first.cancel()
    await second
    assert len(read_journal(tmp_path)) == 2


async def test_a_journal_at_its_size_takes_no_turn(open_journal: OpenJournal) -> None:
    journal = open_journal(max_bytes=4096)
    journal.check_room()
    assert journal.pressure < 0.5
    while journal.pressure < 1.0:
        await journal.record(make_turn())
    with pytest.raises(ServiceDegraded):
        journal.check_room()


async def test_a_journal_on_a_full_disk_takes_no_turn(open_journal: OpenJournal) -> None:
    journal = open_journal(min_free_bytes=1 << 60)
    with pytest.raises(ServiceDegraded):
        journal.check_room()


# What a writer does when it is killed, or has no room.

_WRITER = """
import asyncio, os, sys
from pathlib import Path
from ibex.stores.journal.writer import Journal
from tests.turns import make_turn

async def main(directory, fd):
    journal = Journal(Path(directory), writer="worker-0", segment_bytes=64 << 10, min_free_bytes=0)
    journal.open()
    async def chat():
        while True:
            turn = make_turn()
            await journal.record(turn)
            os.write(fd, turn.turn_id.bytes)
            await asyncio.sleep(0)
    await asyncio.gather(*(chat() for _ in range(20)))

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


def test_everything_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    acknowledged: set[UUID] = set()
    for _ in range(20):
        ours, theirs = os.pipe()
        process = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(tmp_path), str(theirs)],
            pass_fds=[theirs],
            cwd=Path(__file__).parents[2],
        )
        os.close(theirs)
        select.select([ours], [], [], 20)  # it has begun
        deadline = time.monotonic() + random.uniform(0.0, 0.05)
        told = b""
        while time.monotonic() < deadline:
            told += os.read(ours, 1 << 16)
        process.send_signal(signal.SIGKILL)
        process.wait()
        while more := os.read(ours, 1 << 16):
            told += more
        os.close(ours)
        acknowledged |= {UUID(bytes=told[at : at + 16]) for at in range(0, len(told) - 15, 16)}
    turn_ids = [turn.turn_id for turn in read_journal(tmp_path)]
    assert len(turn_ids) == len(set(turn_ids))
    assert len(acknowledged) > 1000
    assert acknowledged <= set(turn_ids)


async def test_a_segment_without_room_is_cut_back_and_the_turn_goes_to_a_new_one(
    open_journal: OpenJournal, tmp_path: Path
) -> None:
    journal = open_journal()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        await asyncio.gather(*(journal.record(make_turn()) for _ in range(4)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    await journal.close()
    assert len(readers(tmp_path)) == 2
    assert [read_all(reader)[1] for reader in readers(tmp_path)] == [[], []], "no torn record is left"
    assert len(read_journal(tmp_path)) == 4


async def test_turns_fail_while_nothing_can_be_written_and_not_after(open_journal: OpenJournal, tmp_path: Path) -> None:
    journal = open_journal()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (HEADER_SIZE - 1, hard))
    try:
        failed = [journal.record(make_turn()) for _ in range(3)]
        for future in failed:
            with pytest.raises(StoreUnavailable):
                await future
        with pytest.raises(ServiceDegraded):
            journal.check_room()
        assert journal.pressure == 1.0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    turn = make_turn()
    await journal.record(turn)
    journal.check_room()
    assert read_journal(tmp_path) == [turn]
    assert not files_of(tmp_path, "*.new"), "no segment is left half made"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


async def test_a_disk_that_fills_up_loses_nothing_acknowledged(small_disk: Path) -> None:
    journal = Journal(small_disk, writer="worker-0", min_free_bytes=0)
    journal.open()
    acknowledged = []

    async def fill() -> None:
        while True:
            turn = make_turn()
            await journal.record(turn)
            acknowledged.append(turn)

    with pytest.raises(StoreUnavailable):
        await fill()
    await journal.close()
    assert read_journal(small_disk) == acknowledged
    assert len(acknowledged) > 50


# Nudges.


async def test_a_burst_of_turns_nudges_at_once_and_once_more_after_it(
    open_journal: OpenJournal, tmp_path: Path
) -> None:
    directory = tmp_path / ("long" * 30)
    directory.mkdir()
    nudges: list[float] = []
    with NudgeListener(directory / "recorder.sock", lambda: nudges.append(time.monotonic())):
        journal = open_journal(nudge=directory / "recorder.sock")
        began = time.monotonic()
        for _ in range(200):
            await journal.record(make_turn())
            await asyncio.sleep(0)
        ended = time.monotonic()
        await eventually(lambda: len(nudges) >= 2 and nudges[-1] >= ended)
        assert len(nudges) <= 3 + (time.monotonic() - began) / 0.02


async def test_a_journal_without_a_recorder_takes_turns(open_journal: OpenJournal, tmp_path: Path) -> None:
    journal = open_journal(nudge=tmp_path / "recorder.sock")
    await journal.record(make_turn())
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)  # bound, and never read: its queue fills up
    listener.bind(str(tmp_path / "recorder.sock"))
    await journal.record(make_turn())
    listener.close()
    assert len(read_journal(tmp_path)) == 2


def test_a_segment_being_made_is_no_segment_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    flock = fcntl.flock

    def look_and_lock(fd: int, operation: int) -> None:
        seen.append(readers(tmp_path))
        flock(fd, operation)

    monkeypatch.setattr("ibex.stores.journal.segment_writer.fcntl.flock", look_and_lock)
    SegmentWriter.create(tmp_path, "worker-0").close()
    assert seen == [[]]
    assert len(readers(tmp_path)) == 1
