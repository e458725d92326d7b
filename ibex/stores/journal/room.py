"""How much a journal holds, and how much more it may: bounds on its size, on its age and on the free disk."""

import os
import time
from pathlib import Path
from typing import Self
from uuid import UUID

from ibex.config import Settings
from ibex.stores.journal.segments import HEADER_SIZE, SUFFIX


class JournalRoom:
    """How much the journal holds and may still hold, measured now and then and reckoned in between."""

    def __init__(self, directory: Path, *, max_bytes: int, min_free_bytes: int, max_age_seconds: float = 0.0) -> None:
        """`max_age_seconds`: how old a turn may become that is not delivered; 0: as old as it must."""
        self._directory = directory
        self._max_bytes = max_bytes
        self._min_free_bytes = min_free_bytes
        self._max_age = max_age_seconds
        self._age = 0.0
        self._size = 0
        self._is_seen = False
        self._free = 0
        self._grown = 0

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """That of this data directory's journal, not measured yet."""
        return cls(
            settings.journal_dir,
            max_bytes=settings.journal_max_bytes,
            min_free_bytes=settings.journal_min_free_bytes,
            max_age_seconds=settings.journal_max_age_seconds,
        )

    def grow(self, size: int) -> None:
        """Reckon bytes written since the last measurement."""
        self._grown += size

    @property
    def pressure(self) -> float:
        """The nearest of the bounds, size, age and free disk, from 0 to 1."""
        by_size = (self._size + self._grown) / self._max_bytes
        free = self._free - self._grown
        by_free = 1.0 if free <= self._min_free_bytes else self._min_free_bytes / free
        by_age = self._age / self._max_age if self._max_age else 0.0
        return min(1.0, max(by_size, by_free, by_age))

    @property
    def excess(self) -> list[str]:
        """Which bounds were passed when it was last measured, in an operator's words."""
        found = [] if self._is_seen else ["it cannot be looked at"]
        if self._is_seen and self._free <= self._min_free_bytes:
            found.append(
                f"its disk has {_mib(self._free)} free, IBEX_JOURNAL_MIN_FREE_BYTES is {_mib(self._min_free_bytes)}"
            )
        if self._size >= self._max_bytes:
            found.append(f"it holds {_mib(self._size)}, IBEX_JOURNAL_MAX_BYTES is {_mib(self._max_bytes)}")
        if self._max_age and self._age >= self._max_age:
            found.append(f"a turn waits for {self._age:.0f} s, IBEX_JOURNAL_MAX_AGE_SECONDS is {self._max_age:.0f}")
        return found

    def measure(self) -> None:
        """Look at the directory and its disk; a journal that cannot be looked at is full."""
        try:
            self._size = directory_size(self._directory)
            self._age = oldest_age(self._directory) if self._max_age else 0.0
            disk = os.statvfs(self._directory)
            self._free = disk.f_bavail * disk.f_frsize
            self._is_seen = True
        except OSError:
            self._free = 0
            self._is_seen = False
        self._grown = 0


def _mib(size: int) -> str:
    return f"{size / (1 << 20):,.0f} MiB"


def oldest_age(directory: Path) -> float:
    """Seconds since the oldest segment that holds turns was begun: its name says when."""
    oldest = None
    with os.scandir(directory) as entries:
        for entry in entries:
            name = entry.name.removesuffix(SUFFIX)
            try:
                if name != entry.name and (oldest is None or name < oldest) and entry.stat().st_size > HEADER_SIZE:
                    oldest = name
            except FileNotFoundError:
                continue
    return 0.0 if oldest is None else max(0.0, time.time() - (UUID(oldest).int >> 80) / 1000)


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
