"""The journal's recorder lock: one process at a time delivers from a journal; it dies with the process."""

import fcntl
import os
from pathlib import Path


def lock_journal(directory: Path) -> int | None:
    """The descriptor that holds the lock, to be closed by the caller; None while another process has it."""
    fd = os.open(directory / "recorder.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd
