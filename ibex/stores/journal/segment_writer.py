"""The writing side of one segment: whole records or none, and its lock for as long as it may grow."""

import fcntl
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ibex.domain.turns import mint_uuid7
from ibex.stores.journal.segments import HEADER_SIZE, SUFFIX, encode_header

UNBORN_SUFFIX = ".new"
"""A segment gets its real name when it is locked and has its header: no reader ever sees one that looks abandoned."""


class SegmentWriter:
    """A segment being written by this process. Sealed by its first failure: nothing is ever written after damage."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.size = HEADER_SIZE
        """Bytes of header and whole records."""
        self.is_sealed = False
        self._fd = fd
        self._directory_is_synced = False

    @classmethod
    def create(cls, directory: Path, writer: str) -> "SegmentWriter":
        """Make a new segment, mode 0600. Raises OSError, leaving nothing behind."""
        path = directory / f"{mint_uuid7()}{SUFFIX}"
        unborn = path.with_suffix(UNBORN_SUFFIX)
        fd = os.open(unborn, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            header = encode_header(writer, time.time_ns() // 1000)
            if os.write(fd, header) != len(header):
                raise OSError(f"no room for a segment's header in {directory.name}")
            unborn.rename(path)
        except OSError:
            os.close(fd)
            with suppress(OSError):
                unborn.unlink()
            raise
        return cls(path, fd)

    def append(self, records: Sequence[bytes]) -> int:
        """Write records with one `write`; answers how many of them are whole in the segment.

        Fewer than all: what came of the next one is cut off again, and the segment is sealed. Raises OSError when there
        was nothing but a failure.
        """
        data = b"".join(records)
        try:
            written = os.write(self._fd, data)
        except OSError:
            self.is_sealed = True
            raise
        if written == len(data):
            self.size += written
            return len(records)
        self.is_sealed = True
        whole = 0
        for record in records:
            if written < len(record):
                break
            written -= len(record)
            self.size += len(record)
            whole += 1
        # Only bytes of an unfinished record go, which no reader has taken. If even that fails, readers set them aside.
        with suppress(OSError):
            os.ftruncate(self._fd, self.size)
        return whole

    def sync(self) -> None:
        """Bring it to the disk, its name too. Blocks; raises OSError."""
        os.fdatasync(self._fd)
        if not self._directory_is_synced:
            directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
            self._directory_is_synced = True

    @property
    def has_turns(self) -> bool:
        """Whether anything was written to it."""
        return self.size > HEADER_SIZE

    def close(self) -> None:
        """Let go of it: from here on it is final."""
        self.is_sealed = True
        os.close(self._fd)
