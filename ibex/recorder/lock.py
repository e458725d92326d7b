"""The journal's recorder lock: one process at a time delivers from a journal; it dies with the process."""

import fcntl
import os
import time
from pathlib import Path

_NAME = "recorder.lock"
_WIDTH = 20
_LOOKS, _LOOK_SECONDS = 100, 0.001
"""How often the number of a process is looked for that has taken the lock and not written it yet."""


def lock_journal(directory: Path) -> int | None:
    """The descriptor that holds the lock, to be closed by the caller; None while another process has it."""
    fd = os.open(directory / _NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    # One write over a predecessor's number, never a truncation: who looks meanwhile must not find nothing.
    os.pwrite(fd, str(os.getpid()).ljust(_WIDTH).encode(), 0)
    return fd


def find_recorder(directory: Path) -> int | None:
    """The process that delivers from a journal, by the number it has where it runs; None when none does, 0 when one
    that was stopped in mid-start has not said its number.

    It looks by taking the lock for a moment, so one that finds it taken should try again before it gives up.
    """
    try:
        fd = os.open(directory / _NAME, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return _read_holder(fd)
    finally:
        os.close(fd)


def _read_holder(fd: int) -> int | None:
    for _ in range(_LOOKS):
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            number = os.pread(fd, _WIDTH, 0).strip()
            if number.isdigit():
                return int(number)
            time.sleep(_LOOK_SECONDS)
        else:
            return None
    return 0
