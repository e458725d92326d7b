"""How much a journal holds, and how much more it may: bounds on its size and on the free disk."""

import os
from pathlib import Path


class JournalRoom:
    """How much the journal holds and may still hold, measured now and then and reckoned in between."""

    def __init__(self, directory: Path, *, max_bytes: int, min_free_bytes: int) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._min_free_bytes = min_free_bytes
        self._size = 0
        self._free = 0
        self._grown = 0

    def grow(self, size: int) -> None:
        """Reckon bytes written since the last measurement."""
        self._grown += size

    @property
    def pressure(self) -> float:
        """The nearer of the two bounds, size and free disk, from 0 to 1."""
        by_size = (self._size + self._grown) / self._max_bytes
        free = self._free - self._grown
        by_free = 1.0 if free <= self._min_free_bytes else self._min_free_bytes / free
        return min(1.0, max(by_size, by_free))

    def measure(self) -> None:
        """Look at the directory and its disk; a journal that cannot be looked at is full."""
        try:
            self._size = directory_size(self._directory)
            disk = os.statvfs(self._directory)
            self._free = disk.f_bavail * disk.f_frsize
        except OSError:
            self._free = 0
        self._grown = 0


def directory_size(directory: Path) -> int:
    """Bytes of the files in a directory, as far as they are still there."""
    size = 0
    with os.scandir(directory) as entries:
        for entry in entries:
            try:
                size += entry.stat(follow_symlinks=False).st_size
            except FileNotFoundError:
                continue
    return size
