"""The journal's directory as the recorder sees it: segments, oldest first, and what cannot be read in them."""

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

from ibex.recorder.ledger import Place
from ibex.stores.journal.segment_writer import UNBORN_SUFFIX
from ibex.stores.journal.segments import HEADER_SIZE, SUFFIX, Extract, Record, SegmentReader

log = logging.getLogger("ibex.recorder")

_RECENT_SECONDS = 1.0
_STILLBORN_SECONDS = 60.0


@dataclass(slots=True)
class Portion:
    """A place in a segment with the records it holds."""

    place: Place
    records: list[Record] = field(default_factory=list)

    def extend(self, portion: "Portion") -> None:
        """Take in what follows directly."""
        self.place = Place(self.place.segment, self.place.start, portion.place.stop)
        self.records += portion.records


class Spool:
    """All segments there are. Reading never waits for anybody."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._readers: dict[str, SegmentReader] = {}
        self._unsupported: set[str] = set()
        self._seen_at = 0
        self.refresh()
        self._first_sizes = {segment: self.size(segment) for segment in self._readers}

    def refresh(self) -> None:
        """Notice segments that have come or gone. Cheap when the directory has not changed for a while."""
        changed_at = self._directory.stat().st_mtime_ns
        if changed_at == self._seen_at and time.time_ns() - changed_at > _RECENT_SECONDS * 1e9:
            return
        names = {path.name for path in self._directory.iterdir()}
        for path in sorted(self._directory / name for name in names if name.endswith(SUFFIX)):
            segment = path.name.removesuffix(SUFFIX)
            if segment not in self._readers and segment not in self._unsupported:
                self._add(SegmentReader(path))
        for segment in self._readers.keys() - {name.removesuffix(SUFFIX) for name in names}:
            log.error("a segment was deleted before it was delivered", extra={"segment": segment})
            del self._readers[segment]
        for name in names:
            if name.endswith(UNBORN_SUFFIX):
                self._remove_stillborn(self._directory / name)
        self._seen_at = changed_at

    def _add(self, reader: SegmentReader) -> None:
        if reader.is_supported:
            self._readers[reader.segment] = reader
        else:
            self._unsupported.add(reader.segment)
            log.error("a later version's segment waits for that version", extra={"segment": reader.segment})

    def _remove_stillborn(self, path: Path) -> None:
        """A writer that died between making a segment and naming it left no turn in it."""
        try:
            if time.time() - path.stat().st_mtime > _STILLBORN_SECONDS:
                path.unlink()
        except FileNotFoundError:
            pass

    @property
    def segments(self) -> list[str]:
        """Names, oldest first."""
        return list(self._readers)

    def size(self, segment: str) -> int:
        """Bytes of a segment so far."""
        return self._readers[segment].size()

    def is_final(self, segment: str) -> bool:
        """Whether nothing can be added to it any more (as last seen by `size` or a read)."""
        return self._readers[segment].final_size is not None

    def was_there(self, place: Place) -> bool:
        """Whether some of the place was written before this recorder began, and may have been delivered by another."""
        return place.start < self._first_sizes.get(place.segment, 0)

    def read(self, segment: str, start: int, *, limit: int) -> Portion | None:
        """What has been added to a segment since a place; None when nothing has, or nothing can be had yet."""
        reader = self._readers[segment]
        if reader.final_size is not None and start >= reader.final_size:
            return None
        return self._portion(reader, reader.read(start, limit=limit))

    def read_again(self, place: Place) -> Portion:
        """The same place, with the same records; none when somebody has deleted the segment."""
        reader = self._readers.get(place.segment)
        if reader is None:
            log.error("a segment under delivery is gone", extra={"segment": place.segment})
            return Portion(place)
        extract = reader.read(place.start, limit=place.stop - place.start, stop=place.stop)
        return self._portion(reader, extract) or Portion(place)

    def _portion(self, reader: SegmentReader, extract: Extract) -> Portion | None:
        for start, stop in extract.unreadable:
            self._quarantine(reader, start, stop)
        if extract.stop == extract.start:
            return None
        return Portion(Place(reader.segment, extract.start, extract.stop), extract.records)

    def _quarantine(self, reader: SegmentReader, start: int, stop: int) -> None:
        """Keep bytes that do not check, once, under the name of their place."""
        path = self._directory / f"{reader.segment}-{start}-{stop}.quarantine"
        if path.exists():
            return
        unnamed = path.with_suffix(".partial")
        unnamed.touch(mode=0o600)
        unnamed.write_bytes(reader.read_bytes(start, stop))
        unnamed.rename(path)
        # A writer killed in mid-write leaves a torn tail: a turn that was never acknowledged. Anything else is damage.
        is_tail = stop == reader.final_size
        log.log(
            logging.WARNING if is_tail else logging.ERROR,
            "journal bytes set aside",
            extra={"segment": reader.segment, "start": start, "bytes": stop - start, "is_tail": is_tail},
        )

    def count_quarantined(self) -> int:
        """How many places of unreadable bytes are kept."""
        return sum(1 for path in self._directory.iterdir() if path.suffix == ".quarantine")

    def remove(self, segment: str) -> None:
        """Delete a segment that every sink has all of."""
        reader = self._readers.pop(segment)
        self._first_sizes.pop(segment, None)
        reader.path.unlink(missing_ok=True)


FIRST_POSITION = HEADER_SIZE
"""Where a segment without a mark is read from."""
