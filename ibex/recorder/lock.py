"""The journal's recorder lock: one process at a time delivers from a journal; it dies with the process."""

import fcntl
import os
from pathlib import Path

_NAME = "recorder.lock"


def lock_journal(directory: Path) -> int | None:
    """The descriptor that holds the lock, to be closed by the caller; None while another process has it."""
    fd = os.open(directory / _NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    os.ftruncate(fd, 0)
    os.pwrite(fd, str(os.getpid()).encode(), 0)
    return fd


def find_recorder(directory: Path) -> int | None:
    """The process that delivers from a journal, by the number it has where it runs; None when none does.

    It looks by taking the lock for a moment, so one that finds it taken should try again before it gives up.
    """
    try:
        fd = os.open(directory / _NAME, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        number = os.pread(fd, 20, 0)
        return int(number) if number.isdigit() else 0
    finally:
        os.close(fd)
    return None
