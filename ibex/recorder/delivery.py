"""One sink's delivery: from its marks in the journal's segments to the end of what is there, for ever."""

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress

from ibex.domain.turns import decode_turn
from ibex.errors import StoreError, StoreUnavailable
from ibex.recorder.ledger import Batch, Ledger, Refusal
from ibex.recorder.sinks import Sink
from ibex.recorder.spool import FIRST_POSITION, Portion, Spool

log = logging.getLogger("ibex.recorder")

_POLL_SECONDS = 0.25
"""How long a lost nudge can delay a turn."""
_REPLAY_SECONDS = 1.0
_MAX_BACKOFF_SECONDS = 1.5
_BATCH_BYTES = 8 << 20
_DOUBT_SECONDS = 60.0
"""Age from which a batch without an answer is looked up: its token may be out of ClickHouse's window."""


class Delivery:
    """Sends batches to one sink, one at a time; waits for nobody but that sink."""

    def __init__(self, sink: Sink, spool: Spool, ledger: Ledger) -> None:
        self.sink = sink
        self._spool = spool
        self._ledger = ledger
        self._marks = ledger.marks(sink.name)
        self._batch = ledger.open_batch(sink.name)
        self._is_resumed = self._batch is not None
        self._wake = asyncio.Event()
        self._sent_at = -self.sink.spacing
        self._replayed_at = 0.0
        self._failures = 0

    def position(self, segment: str) -> int:
        """Up to where this sink has everything in a segment."""
        return self._marks.get(segment, FIRST_POSITION)

    @property
    def is_away(self) -> bool:
        """Whether the sink took nothing the last time."""
        return bool(self._failures)

    def forget(self, segment: str) -> None:
        """The segment is gone."""
        self._marks.pop(segment, None)

    def nudge(self) -> None:
        """There may be something to deliver."""
        self._wake.set()

    async def run(self, stop: asyncio.Event) -> None:
        """Deliver until `stop`, and then what is there, unless the sink is away."""
        while True:
            try:
                is_idle = not await self.deliver()
                if is_idle:
                    await self._replay()
                self._report(None)
            except StoreError as error:  # a refusal too: sinks say of which rows they refuse the content
                self._report(error)
            except Exception as error:  # a fault in one sink's rows or code must not stop the other sink
                log.exception("delivery failed", extra={"sink": self.sink.name})
                self._report(error)
            if self._failures:
                if stop.is_set():
                    return
                await _wait(stop, min(_MAX_BACKOFF_SECONDS, 0.05 * 2 ** min(self._failures, 8)))
            elif is_idle:
                if stop.is_set():
                    return
                await _wait(self._wake, _POLL_SECONDS)
                self._wake.clear()

    async def deliver(self) -> bool:
        """Send one batch: the one whose answer is not known, else the next; False when there is none."""
        batch = self._batch
        if batch is not None:
            await self._keep_spacing()
            portions = [self._spool.read_again(place) for place in batch.places]
        else:
            if not self._has_news():
                return False
            await self._keep_spacing()
            portions = self._gather()
            if not portions:
                return False
            batch = self._batch = Batch(tuple(portion.place for portion in portions), time.time())
            # Without room for the ledger, delivery goes on and makes room; a successor looks up what it finds.
            with suppress(StoreUnavailable):
                self._ledger.begin(self.sink.name, batch)
        refusals = await self._send(portions, batch)
        self._finish(batch, refusals)
        return True

    def _finish(self, batch: Batch, refusals: list[Refusal]) -> None:
        try:
            self._ledger.finish(self.sink.name, batch, refusals)
        except StoreUnavailable:
            if refusals:
                raise  # a turn is put aside durably, or not yet done with
        self._batch = None
        self._is_resumed = False
        self._marks.update({place.segment: place.stop for place in batch.places})

    def _has_news(self) -> bool:
        self._spool.refresh()
        return any(self._spool.size(segment) > self.position(segment) for segment in self._spool.segments)

    def _gather(self) -> list[Portion]:
        """The next records of all segments, oldest segments first."""
        portions: list[Portion] = []
        turns, size = 0, 0
        for segment in self._spool.segments:
            start = self.position(segment)
            limit = min(_BATCH_BYTES - size, 1 << 20)
            while turns < self.sink.max_turns and size < _BATCH_BYTES:
                portion = self._spool.read(segment, start, limit=limit)
                if portion is None:
                    break
                _add(portions, portion)
                start = portion.place.stop
                turns += len(portion.records)
                size += portion.place.stop - portion.place.start
        return portions

    async def _keep_spacing(self) -> None:
        wait = self._sent_at + self.sink.spacing - time.monotonic()
        if wait > 0:
            await asyncio.sleep(wait)
        self._sent_at = time.monotonic()

    async def _send(self, portions: Sequence[Portion], batch: Batch) -> list[Refusal]:
        turns, refusals = [], []
        origins: dict[int, Refusal] = {}
        for portion in portions:
            for record in portion.records:
                origin = Refusal(portion.place.segment, record.start, None, "not a turn", record.payload)
                try:
                    turn = decode_turn(record.payload)
                except ValueError:
                    refusals.append(origin)
                    continue
                if self.sink.wants(turn):
                    turns.append(turn)
                    origins[id(turn)] = origin
        if not turns:
            return refusals
        is_doubtful = self._is_doubtful(batch)
        for turn, reason in await self.sink.send(turns, token=batch.token, is_doubtful=is_doubtful):
            origin = origins[id(turn)]
            log.error("turn put aside", extra={"sink": self.sink.name, "turn_id": str(turn.turn_id), "reason": reason})
            refusals.append(Refusal(origin.segment, origin.start, turn.turn_id, reason, origin.payload, turn.org_id))
        return refusals

    def _is_doubtful(self, batch: Batch) -> bool:
        """Whether turns of the batch may be stored without this recorder knowing, and without a token to tell."""
        return (
            self._is_resumed
            or time.time() - batch.recorded_at > _DOUBT_SECONDS
            or any(self._spool.was_there(place) for place in batch.places)
        )

    async def _replay(self) -> None:
        """Try dead letters once more that somebody asked for."""
        if time.monotonic() - self._replayed_at < _REPLAY_SECONDS:
            return
        self._replayed_at = time.monotonic()
        for letter in self._ledger.wanted_replays(self.sink.name):
            try:
                turn = decode_turn(letter.payload)
            except ValueError:
                self._ledger.settle_replay(letter.dead_letter_id, "not a turn")
                continue
            token = f"{letter.segment}:{letter.start}:replay"
            refused = await self.sink.send([turn], token=token, is_doubtful=True)
            self._ledger.settle_replay(letter.dead_letter_id, refused[0][1] if refused else None)

    def _report(self, error: Exception | None) -> None:
        """Log a change of state, not every failure."""
        if error is not None and not self._failures:
            log.warning("store away", extra={"sink": self.sink.name, "reason": str(error)})
        elif error is None and self._failures:
            log.warning("store back", extra={"sink": self.sink.name})
        self._failures = 0 if error is None else self._failures + 1


def _add(portions: list[Portion], portion: Portion) -> None:
    """Append a portion, joined to the last if it goes on where that ends."""
    last = portions[-1] if portions else None
    if last is not None and last.place.segment == portion.place.segment:
        last.extend(portion)
    else:
        portions.append(portion)


async def _wait(event: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)


def slowest_position(deliveries: Iterable[Delivery], segment: str) -> int:
    """Up to where every sink has everything in a segment."""
    return min(delivery.position(segment) for delivery in deliveries)
