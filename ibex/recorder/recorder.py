"""The recorder: one process a node that takes finished turns from the journal to Postgres and ClickHouse."""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path

from ibex.config import Settings
from ibex.errors import StoreError, StoreUnavailable
from ibex.recorder.backlog import Backlog
from ibex.recorder.delivery import Delivery, slowest_position
from ibex.recorder.erasure import forget_erased
from ibex.recorder.ledger import Ledger
from ibex.recorder.lock import find_recorder, lock_journal
from ibex.recorder.retention import expire_checkpoints
from ibex.recorder.sinks import CheckpointSink, TraceSink
from ibex.recorder.spool import Spool
from ibex.recorder.sweeper import prune_old_changes, sweep_sessions
from ibex.recorder.take_backs import TakeBacks
from ibex.stores.clickhouse.traces import TraceStore
from ibex.stores.journal.nudges import NudgeListener, nudge_path
from ibex.stores.journal.room import JournalRoom, directory_size
from ibex.stores.postgres.sessions import SessionStore
from ibex.telemetry import Metrics

log = logging.getLogger("ibex.recorder")

_HOUSEKEEPING_SECONDS = 1.0
_LAST_DELIVERY_SECONDS = 5.0
_LAST_SETTLEMENT_SECONDS = 2.0
_LOCK_POLL_SECONDS = 0.05
_PREDECESSOR_SECONDS = 10.0
"""How long the recorder that this one replaces may take to leave the journal before it is worth a line."""


class Recorder:
    """Delivers a journal's turns, each once to each store; the two deliveries never wait for each other."""

    def __init__(
        self,
        settings: Settings,
        *,
        journal_dir: Path,
        sessions: SessionStore,
        traces: TraceStore,
        metrics: Metrics,
        prune: Callable[[], Awaitable[int]],
    ) -> None:
        """`prune` deletes changes that are of no more use to anybody; it is called once an hour."""
        self._directory = journal_dir
        self._room = JournalRoom(
            journal_dir,
            max_bytes=settings.journal_max_bytes,
            min_free_bytes=settings.journal_min_free_bytes,
            max_age_seconds=settings.journal_max_age_seconds,
        )
        self._idle = timedelta(minutes=settings.session_idle_minutes)
        self._retention = timedelta(days=settings.checkpoint_retention_days)
        self._sessions = sessions
        self._traces = traces
        self._metrics = metrics
        self._prune = prune

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop`; then deliver what is there, for a few seconds at most.

        Waits for a predecessor that still holds the journal. Raises OSError when the journal's directory fails.
        """
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        async with _sole_recorder(self._directory, stop) as is_sole:
            if is_sole:
                ledger = Ledger(self._directory)
                try:
                    await self._run(ledger, stop)
                finally:
                    ledger.close()

    async def _run(self, ledger: Ledger, stop: asyncio.Event) -> None:
        spool = Spool(self._directory)
        take_backs = TakeBacks(self._traces.erasure, self._metrics)
        sinks = (CheckpointSink(self._sessions, self._metrics), TraceSink(self._traces, self._metrics, take_backs))
        deliveries = [Delivery(sink, spool, ledger) for sink in sinks]
        backlog = Backlog(spool, deliveries)

        def nudge_all() -> None:
            for delivery in deliveries:
                delivery.nudge()

        with NudgeListener(nudge_path(self._directory), nudge_all):
            async with asyncio.TaskGroup() as tasks:
                for delivery in deliveries:
                    tasks.create_task(_deliver(delivery, stop), name=f"delivery to {delivery.sink.name}")
                tasks.create_task(sweep_sessions(self._sessions, self._idle, self._metrics, stop), name="sweeper")
                tasks.create_task(prune_old_changes(self._prune, stop), name="pruning")
                tasks.create_task(take_backs.run(stop), name="take-backs")
                tasks.create_task(forget_erased(ledger, self._traces.erasure, stop), name="erasure")
                if self._retention:
                    expiry = expire_checkpoints(self._sessions, self._retention, self._metrics, stop)
                    tasks.create_task(expiry, name="retention")
                while not stop.is_set():
                    self._keep_house(spool, ledger, deliveries, backlog)
                    with suppress(TimeoutError):
                        await asyncio.wait_for(stop.wait(), _HOUSEKEEPING_SECONDS)
        self._keep_house(spool, ledger, deliveries, backlog)
        with suppress(StoreError, TimeoutError):  # what is owed still is found by a sweep
            async with asyncio.timeout(_LAST_SETTLEMENT_SECONDS):
                await take_backs.settle()

    def _keep_house(self, spool: Spool, ledger: Ledger, deliveries: list[Delivery], backlog: Backlog) -> None:
        """Remove segments that both sinks have all of, and measure what is left."""
        spool.refresh()
        for segment in spool.segments:
            size = spool.size(segment)
            if spool.is_final(segment) and slowest_position(deliveries, segment) >= size:
                spool.remove(segment)
                backlog.forget(segment)
                for delivery in deliveries:
                    delivery.forget(segment)
        # After the files are gone: a mark too many does no harm, a mark too few delivers a whole segment again.
        gone = ledger.known_segments().difference(spool.segments)
        if gone:
            with suppress(StoreUnavailable):
                ledger.forget_segments(sorted(gone))
        backlog.measure()
        self._metrics.journal_pending_turns.set(backlog.turns)
        self._metrics.journal_oldest_seconds.set(backlog.oldest_seconds)
        self._metrics.journal_bytes.set(directory_size(self._directory))
        self._room.measure()
        self._metrics.journal_pressure_ratio.set(self._room.pressure)
        for delivery in deliveries:
            self._metrics.store_away.labels(delivery.sink.name).set(float(delivery.is_away))
        self._metrics.journal_dead_letters.set(ledger.count_dead_letters() + spool.count_quarantined())


async def _deliver(delivery: Delivery, stop: asyncio.Event) -> None:
    """Run a delivery; once stopping, only for a while longer."""
    async with asyncio.TaskGroup() as tasks:
        work = tasks.create_task(delivery.run(stop))
        await stop.wait()
        delivery.nudge()
        _, late = await asyncio.wait([work], timeout=_LAST_DELIVERY_SECONDS)
        if late:
            work.cancel()
            log.warning("turns left for the next start", extra={"sink": delivery.sink.name})


@asynccontextmanager
async def _sole_recorder(directory: Path, stop: asyncio.Event) -> AsyncIterator[bool]:
    """Hold the journal's recorder lock, which dies with the process; False when stopped before it was free."""
    began, is_said = time.monotonic(), False
    while (fd := lock_journal(directory)) is None:
        if not is_said and time.monotonic() - began > _PREDECESSOR_SECONDS:
            is_said = True
            log.warning("waiting: another recorder has this journal", extra={"pid": find_recorder(directory)})
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), _LOCK_POLL_SECONDS)
        if stop.is_set():
            yield False
            return
    try:
        yield True
    finally:
        os.close(fd)
