"""Delivery of a journal whose node is gone: everything in it, each turn once, then the end."""

import asyncio
import os
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from ibex.errors import OperatorError
from ibex.recorder.delivery import Delivery, slowest_position
from ibex.recorder.ledger import Ledger
from ibex.recorder.lock import lock_journal
from ibex.recorder.sinks import CheckpointSink, TraceSink
from ibex.recorder.spool import Spool
from ibex.recorder.take_backs import TakeBacks
from ibex.stores.clickhouse.traces import TraceStore
from ibex.stores.journal.segments import SUFFIX
from ibex.stores.postgres.sessions import SessionStore
from ibex.telemetry import Metrics


@dataclass(frozen=True, slots=True)
class Salvage:
    """What became of a journal."""

    segments_delivered: int
    """Those that both stores have all of; they are removed."""
    segments_left: int
    """Those that are still written to, or that a store could not take just now."""
    checkpoints_written: int
    checkpoints_known: int
    """Those that Postgres had already."""
    dropped: int
    """Turns that one store or both need no more, since their organization was erased."""
    dead_letters: int
    """Turns a store refused for their content, before or now; they lie in the journal's ledger."""
    quarantined: int
    """Places whose bytes do not check; they lie in files of their own."""


async def deliver_journal(directory: Path, sessions: SessionStore, traces: TraceStore) -> Salvage:
    """Deliver what is in a journal's directory and remove what both stores have.

    Which turns they may have had before is asked of them, so a ledger that is missing or old does no harm. Raises
    OperatorError when there is no journal, or another process delivers it; StoreError when it must be run again.
    """
    fd = _lock(directory)
    try:
        with closing(Ledger(directory)) as ledger:
            return await _deliver(directory, ledger, sessions, traces)
    finally:
        os.close(fd)


def _lock(directory: Path) -> int:
    if not directory.is_dir() or not any(directory.glob(f"*{SUFFIX}")):
        raise OperatorError(
            f"There is no segment in {directory}.", hint="Name the directory that holds *.segment files."
        )
    fd = lock_journal(directory)
    if fd is None:
        raise OperatorError(f"A recorder delivers {directory} already.", hint="Stop its server, or let it do it.")
    return fd


async def _deliver(directory: Path, ledger: Ledger, sessions: SessionStore, traces: TraceStore) -> Salvage:
    metrics, spool = Metrics(), Spool(directory)
    take_backs = TakeBacks(traces.erasure, metrics)
    sinks = (CheckpointSink(sessions, metrics), TraceSink(traces, metrics, take_backs))
    deliveries = [Delivery(sink, spool, ledger) for sink in sinks]
    stop = asyncio.Event()
    stop.set()  # deliver what is there, and end
    async with asyncio.TaskGroup() as tasks:
        for delivery in deliveries:
            tasks.create_task(delivery.run(stop))
    await take_backs.settle()  # before a segment is removed: while one is there, the same can be run again
    removed = 0
    for segment in spool.segments:
        if slowest_position(deliveries, segment) >= spool.size(segment) and spool.is_final(segment):
            spool.remove(segment)
            removed += 1
    written, dropped = metrics.session_checkpoint_total, metrics.erased_turns_dropped_total
    return Salvage(
        segments_delivered=removed,
        segments_left=len(spool.segments),
        checkpoints_written=int(written.labels("ok").value),
        checkpoints_known=int(written.labels("duplicate").value),
        dropped=max(int(dropped.labels(delivery.sink.name).value) for delivery in deliveries),
        dead_letters=ledger.count_dead_letters(),
        quarantined=spool.count_quarantined(),
    )
