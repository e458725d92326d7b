"""The journal's format: segments of checksummed records, one writer each, and how they are read whatever happened.

A segment is a file `<segment id>.segment`: a header of fixed size, then records `magic length crc32 payload`. Its
writer holds the file's flock for as long as it may append, so a free lock means that the segment is final. Nothing in a
segment ever changes: a place in it (segment, start, stop) names its content for good.
"""

import fcntl
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

FORMAT_VERSION: Final = 1
SUFFIX: Final = ".segment"
MAX_PAYLOAD: Final = 256 << 20
"""Bytes; a record that claims more does not check."""

_MAGIC: Final = b"\xc1\xf5ib"
"""Begins with bytes that no UTF-8 text holds, so that a captured prompt cannot look like a record."""
_RECORD: Final = struct.Struct("<4sII")
_CHECKED: Final = struct.Struct("<I")
_HEADER: Final = struct.Struct("<8sHxxxxxxQ36s")
_HEADER_MAGIC: Final = b"\xc1\xf5ibexJ\n"
HEADER_SIZE: Final = _HEADER.size + _CHECKED.size
"""Where the first record of a segment begins."""


def encode_record(payload: bytes) -> bytes:
    """Frame a payload. The checksum covers the length too, so that no flipped bit of a record goes unseen."""
    return b"".join((_RECORD.pack(_MAGIC, len(payload), _checksum(payload)), payload))


def encode_header(writer: str, created_at: int) -> bytes:
    """A segment's first bytes: format version, who writes it, and when it was made (Unix µs)."""
    header = _HEADER.pack(_HEADER_MAGIC, FORMAT_VERSION, created_at, writer.encode()[:36])
    return header + _CHECKED.pack(zlib.crc32(header))


@dataclass(frozen=True, slots=True)
class Record:
    """One checked record and its place in the segment."""

    start: int
    stop: int
    payload: bytes


@dataclass(slots=True)
class Extract:
    """What a read found between two places of a segment."""

    start: int
    stop: int
    """Where to go on. Records, and bytes set aside, fill all from `start` to here."""
    records: list[Record] = field(default_factory=list)
    unreadable: list[tuple[int, int]] = field(default_factory=list)
    """Places whose bytes do not check and, the writer being gone, never will."""


class SegmentReader:
    """One segment, read from any place. Holds no file open: a long outage leaves thousands of segments."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.segment = path.name.removesuffix(SUFFIX)
        self.final_size: int | None = None
        """Bytes, once its writer has let go of it; None until that was seen."""

    @property
    def is_supported(self) -> bool:
        """Whether this version can read it; a later version's segment is left for a later version.

        A header that does not check costs no turn: the records speak for themselves.
        """
        header = self.read_bytes(0, HEADER_SIZE)
        if len(header) < HEADER_SIZE or _CHECKED.unpack_from(header, _HEADER.size)[0] != zlib.crc32(
            header[: _HEADER.size]
        ):
            return True
        return bool(_HEADER.unpack_from(header)[1] <= FORMAT_VERSION)

    def read_bytes(self, start: int, stop: int) -> bytes:
        """The bytes of a place as they are, fewer at the end of the file."""
        with self._open() as fd:
            return os.pread(fd, stop - start, start)

    def read(self, start: int, *, limit: int = 1 << 20, stop: int | None = None) -> Extract:
        """The records from `start` on: about `limit` bytes, at least one record if a whole one is there.

        What does not check is waited for while the writer holds the segment: the read ends before it. Once it is
        final, such bytes are skipped up to the next record that checks, and listed as unreadable. With `stop`, a place
        that was read before is read again, and gives the same.
        """
        limit = max(limit, _RECORD.size)
        with self._open() as fd:
            size = self._look(fd)
            is_final = self.final_size is not None or stop is not None
            end = size if stop is None else min(stop, size)
            extract = Extract(start, start)
            while extract.stop < end and extract.stop - start < limit:
                if not self._read_window(fd, extract, min(end, extract.stop + limit), end, is_final=is_final):
                    break
        return extract

    def size(self) -> int:
        """Bytes so far; also notices that the writer has let go."""
        if self.final_size is not None:
            return self.final_size
        with self._open() as fd:
            return self._look(fd)

    def _look(self, fd: int) -> int:
        """Learn whether the segment is final, then its size: in this order, so that a final size is."""
        if self.final_size is not None:
            return self.final_size
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return os.fstat(fd).st_size
        self.final_size = os.fstat(fd).st_size
        return self.final_size

    def _read_window(self, fd: int, extract: Extract, stop: int, end: int, *, is_final: bool) -> bool:
        """Take what the bytes up to `stop` hold; False when no more can be had before the file grows."""
        base = extract.stop
        data = os.pread(fd, stop - base, base)
        taken = 0
        for record in _records(data, base):
            extract.records.append(record)
            taken = record.stop - base
        extract.stop += taken
        if taken:
            return True
        # Nothing whole at the front of the window: a record larger than it, an unfinished one, or damage.
        need = _claimed_size(data)
        if need is not None and base + need <= end and stop - base < need:
            return self._read_window(fd, extract, base + need, end, is_final=is_final)
        if not is_final:
            return False
        rest = os.pread(fd, end - base, base)
        skipped = _find_record(rest)
        extract.unreadable.append((base, base + skipped))
        extract.stop += skipped
        return True

    @contextmanager
    def _open(self) -> Iterator[int]:
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)


def _checksum(payload: bytes | memoryview) -> int:
    return zlib.crc32(payload, zlib.crc32(_CHECKED.pack(len(payload))))


def _claimed_size(data: bytes, at: int = 0) -> int | None:
    """The size of the record that seems to begin here; None when none does."""
    if len(data) - at < _RECORD.size:
        return None
    magic, length, _ = _RECORD.unpack_from(data, at)
    return _RECORD.size + length if magic == _MAGIC and length <= MAX_PAYLOAD else None


def _records(data: bytes, base: int) -> Iterator[Record]:
    """Whole records that check, from the front, up to the first that does not."""
    at, size, head = 0, len(data), _RECORD.size
    view = memoryview(data)
    while size - at >= head:
        magic, length, checksum = _RECORD.unpack_from(data, at)
        stop = at + head + length
        if magic != _MAGIC or stop > size or checksum != _checksum(payload := view[at + head : stop]):
            return
        yield Record(base + at, base + stop, bytes(payload))
        at = stop


def _find_record(data: bytes) -> int:
    """Where the next record that checks begins, after the front; the end when there is none."""
    at = data.find(_MAGIC, 1)
    while at >= 0:
        need = _claimed_size(data, at)
        if need is not None and at + need <= len(data) and next(_records(data[at : at + need], 0), None) is not None:
            return at
        at = data.find(_MAGIC, at + 1)
    return len(data)
