"""Who looks for a journal's recorder is told its number, at every moment of its start."""

import fcntl
import os
import threading
from pathlib import Path

from ibex.recorder.lock import find_recorder, lock_journal


def test_nobody_delivers_a_journal_that_is_not_locked(tmp_path: Path) -> None:
    assert find_recorder(tmp_path) is None
    fd = lock_journal(tmp_path)
    assert fd is not None
    assert lock_journal(tmp_path) is None
    os.close(fd)
    assert find_recorder(tmp_path) is None


def test_a_longer_number_of_a_predecessor_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "recorder.lock").write_text("4194304999")
    fd = lock_journal(tmp_path)
    assert fd is not None
    assert find_recorder(tmp_path) == os.getpid()
    os.close(fd)


def test_a_recorder_that_has_the_lock_and_not_yet_said_its_number_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "recorder.lock"
    with path.open("wb", buffering=0) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        late = threading.Timer(0.02, lambda: held.write(b"4711".ljust(20)))
        late.start()
        assert find_recorder(tmp_path) == 4711
        late.join()


def test_no_moment_of_a_start_shows_a_process_without_a_number(tmp_path: Path) -> None:
    seen, is_over = set[str](), threading.Event()

    def look() -> None:
        while not is_over.is_set():
            seen.add((tmp_path / "recorder.lock").read_text().strip())

    os.close(lock_journal(tmp_path) or -1)
    looking = threading.Thread(target=look)
    looking.start()
    for _ in range(2000):
        fd = lock_journal(tmp_path)
        assert fd is not None
        os.close(fd)
    is_over.set()
    looking.join()
    assert seen == {str(os.getpid())}
