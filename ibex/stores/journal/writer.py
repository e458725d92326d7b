"""The journal's writer: a turn is in a segment, by one write a tick, before the reply that it records may end."""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from ibex.domain.turns import Turn, encode_turn
from ibex.errors import ServiceDegraded, StoreRefused, StoreUnavailable
from ibex.stores.journal.nudges import Nudger
from ibex.stores.journal.room import JournalRoom
from ibex.stores.journal.segment_writer import SegmentWriter
from ibex.stores.journal.segments import encode_record
from ibex.telemetry import spawn

log = logging.getLogger("ibex.journal")

_MEASURE_SECONDS = 1.0
_BACKGROUND_SYNC_SECONDS = 0.5
"""How long a turn may be in the page cache alone when replies do not wait for the disk."""


class Journal:
    """Turns that are finished and not yet delivered, as one process writes them. One event loop; never blocks it.

    `sync="full"`: a turn is on the disk before its future is done. `"none"`: it survives the death of any process at
    once, and a power loss within a second.
    """

    def __init__(
        self,
        directory: Path,
        *,
        writer: str,
        sync: Literal["none", "full"] = "none",
        segment_bytes: int = 32 << 20,
        segment_seconds: float = 10.0,
        max_bytes: int = 4 << 30,
        min_free_bytes: int = 512 << 20,
        max_age_seconds: float = 0.0,
        nudge: Path | None = None,
    ) -> None:
        self._directory = directory
        self._writer = writer
        self._holds_replies = sync == "full"
        self._segment_bytes = segment_bytes
        self._segment_seconds = segment_seconds
        self._nudger = Nudger(nudge) if nudge is not None else None
        self._room = JournalRoom(
            directory, max_bytes=max_bytes, min_free_bytes=min_free_bytes, max_age_seconds=max_age_seconds
        )
        self._segment: SegmentWriter | None = None
        self._records: list[bytes] = []
        self._futures: list[asyncio.Future[None]] = []
        self._unsynced: dict[SegmentWriter, None] = {}
        self._held: list[asyncio.Future[None]] = []
        self._syncing: asyncio.Task[None] | None = None
        self._rotation: asyncio.TimerHandle | None = None
        self._measuring: asyncio.Task[None] | None = None
        self._is_failing = False
        self._closing = asyncio.Event()
        self._is_open = False

    def open(self) -> None:
        """Make the directory (0700) and the first segment. Raises StoreUnavailable when turns could not be written."""
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._directory.chmod(0o700)
            self._room.measure()
            self._start_segment()
        except OSError as error:
            raise StoreUnavailable(f"The journal cannot be written: {error.strerror}.") from error
        self._is_open = True
        self._measuring = spawn(self._keep_measuring(), name="journal room")

    def record(self, turn: Turn) -> asyncio.Future[None]:
        """Put a turn into the journal; done when it is safe, and the reply it records may end.

        Turns of one event-loop tick share one write. The future fails with StoreUnavailable when the turn could not be
        written, with StoreRefused when it never can be.
        """
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not self._is_open:
            _fail([future], StoreUnavailable("The journal is closed."))
            return future
        try:
            self._records.append(encode_record(encode_turn(turn)))
        except (ValueError, OverflowError, TypeError) as error:
            _fail([future], StoreRefused(f"The turn cannot be encoded: {type(error).__name__}."))
            return future
        self._futures.append(future)
        if len(self._futures) == 1:
            asyncio.get_running_loop().call_soon(self._flush)
        return future

    def check_room(self) -> None:
        """Raise ServiceDegraded while the journal may take no turn. Costs no system call."""
        if self._is_failing or not self._is_open or self._room.pressure >= 1.0:
            raise ServiceDegraded("ibex cannot record this turn just now. Try again shortly.")

    @property
    def pressure(self) -> float:
        """How near the journal is to its bounds, 0 to 1; from 1 on it takes no turn."""
        return 1.0 if self._is_failing else self._room.pressure

    async def close(self) -> None:
        """Write what is there, let go of the segment, and wait until it is on the disk."""
        self._flush()
        self._is_open = False
        self._closing.set()
        for timer in (self._rotation, self._measuring):
            if timer is not None:
                timer.cancel()
        if self._nudger is not None:
            self._nudger.close()
        self._retire_segment()
        if self._syncing is not None:
            await self._syncing

    def _flush(self) -> None:
        """Write all turns of this tick, then let their replies end."""
        records, futures = self._records, self._futures
        if not records:
            return
        self._records, self._futures = [], []
        written, error = 0, None
        for _ in range(2):  # a segment that breaks is sealed, and a new one tried once
            try:
                written += self._append(records[written:])
            except OSError as failure:
                error = failure
            if written == len(records):
                break
        if written:
            self._room.grow(sum(map(len, records[:written])))
            if self._nudger is not None:
                self._nudger.nudge()
            self._settle(futures[:written])
        if written < len(records):
            self._report_failure(error)
            _fail(futures[written:], StoreUnavailable("The journal could not be written."))
        elif self._is_failing:
            self._report_recovery()

    def _append(self, records: Sequence[bytes]) -> int:
        """Append to the current segment, or to a new one; how many records are whole in it."""
        segment = self._segment or self._start_segment()
        try:
            return segment.append(records)
        finally:
            self._unsynced[segment] = None
            self._sync_soon()
            if segment.is_sealed or segment.size >= self._segment_bytes:
                self._retire_segment()

    def _settle(self, futures: list[asyncio.Future[None]]) -> None:
        if self._holds_replies:
            self._held += futures
            return
        for future in futures:
            if not future.done():
                future.set_result(None)

    def _start_segment(self) -> SegmentWriter:
        self._segment = segment = SegmentWriter.create(self._directory, self._writer)
        if self._rotation is not None:
            self._rotation.cancel()
        self._rotation = asyncio.get_running_loop().call_later(self._segment_seconds, self._rotate)
        return segment

    def _rotate(self) -> None:
        """A segment's time is over, if it has turns: also without traffic, so that it can be delivered and removed."""
        if self._segment is not None and not self._segment.has_turns:
            self._rotation = asyncio.get_running_loop().call_later(self._segment_seconds, self._rotate)
            return
        self._retire_segment()
        self._try_segment()

    def _try_segment(self) -> None:
        """Have a segment ready, outside the hot path; after a failure another one, since nobody asks to write now."""
        if self._is_failing:
            self._retire_segment()
        if self._segment is None:
            try:
                self._start_segment()
            except OSError as error:
                self._report_failure(error)
            else:
                self._report_recovery()

    def _retire_segment(self) -> None:
        """Write no more to the current segment; it is let go of when what it has is on the disk."""
        segment, self._segment = self._segment, None
        if segment is not None:
            segment.is_sealed = True
            self._unsynced[segment] = None
            self._sync_soon()

    def _sync_soon(self) -> None:
        if self._syncing is None:
            self._syncing = spawn(self._sync_all(), name="journal sync")

    async def _sync_all(self) -> None:
        """Sync in a thread until nothing is left; a sync that begins after a write covers it."""
        try:
            while self._unsynced:
                if not self._holds_replies:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._closing.wait(), _BACKGROUND_SYNC_SECONDS)
                segments, self._unsynced = list(self._unsynced), {}
                held, self._held = self._held, []
                error = await asyncio.to_thread(_sync_segments, segments)
                if error is None:
                    for future in held:
                        if not future.done():
                            future.set_result(None)
                else:
                    # After a failed sync the kernel may have dropped the pages: nothing may follow them.
                    self._report_failure(error)
                    if self._segment in segments:
                        self._retire_segment()
                        held, self._held = held + self._held, []
                    _fail(held, StoreUnavailable("The journal could not be brought to the disk."))
                    for segment in segments:
                        self._unsynced.pop(segment, None)
                for segment in segments:
                    if segment.is_sealed and segment not in self._unsynced:
                        segment.close()
        finally:
            self._syncing = None

    async def _keep_measuring(self) -> None:
        while True:
            await asyncio.sleep(_MEASURE_SECONDS)
            await asyncio.to_thread(self._room.measure)
            self._try_segment()

    def _report_failure(self, error: OSError | None) -> None:
        if not self._is_failing:
            log.error("journal cannot be written", extra={"reason": error.strerror if error else "short write"})
        self._is_failing = True

    def _report_recovery(self) -> None:
        if self._is_failing:
            log.warning("journal can be written again")
        self._is_failing = False


def _sync_segments(segments: Sequence[SegmentWriter]) -> OSError | None:
    try:
        for segment in segments:
            segment.sync()
    except OSError as error:
        return error
    return None


def _fail(futures: Sequence[asyncio.Future[None]], error: Exception) -> None:
    for future in futures:
        if not future.done():
            future.set_exception(error)
            future.exception()  # seen: a turn whose request has ended already has nobody who waits
