"""Checkpoints past their retention are deleted: by one node at a time, in small batches with as long pauses."""

import asyncio
import logging
import time
from contextlib import suppress
from datetime import timedelta

from ibex.errors import StoreError
from ibex.stores.postgres.sessions import SessionStore
from ibex.telemetry import Metrics

log = logging.getLogger("ibex.recorder")

_RUN_SECONDS = 600.0
_BATCH = 1000
_HELD_SECONDS, _HELD_TRIES = 1.0, 60
"""How soon, and how often in a row, what is held is tried again before it is left to the next run."""


async def expire_checkpoints(
    sessions: SessionStore, age: timedelta, metrics: Metrics, stop: asyncio.Event, *, batch: int = _BATCH
) -> None:
    """Every ten minutes until `stop`: delete the checkpoints recorded longer ago than `age`, `batch` a transaction.

    The age is said aloud before anything is deleted by it: of the ages of many nodes the shortest wins.
    """
    log.warning("old checkpoints of every organization are being deleted", extra={"age_days": age / timedelta(days=1)})
    while not stop.is_set():
        try:
            await _run(sessions, age, metrics, stop, batch)
        except StoreError as error:
            metrics.retention_runs_total.labels("error").inc()
            log.warning("old checkpoints not deleted", extra={"reason": error.message})
        else:
            metrics.retention_runs_total.labels("ok").inc()
        await _rest(stop, _RUN_SECONDS)


async def _run(sessions: SessionStore, age: timedelta, metrics: Metrics, stop: asyncio.Event, batch: int) -> None:
    """Delete until nothing old is left, or another node is at it. Recording must hardly feel it: half of the time goes
    to pauses.
    """
    tries = 0
    while not stop.is_set():
        began = time.monotonic()
        expired = await sessions.expire(age, batch=batch)
        if expired is None:
            return
        metrics.retention_deleted_total.labels("checkpoint").inc(expired.checkpoints)
        metrics.retention_deleted_total.labels("session").inc(expired.sessions)
        if expired.checkpoints:
            tries = 0
            await _rest(stop, time.monotonic() - began)
        elif expired.passed_over and tries < _HELD_TRIES:
            tries += 1
            await _rest(stop, _HELD_SECONDS)
        else:
            if expired.passed_over:
                log.warning("old checkpoints are held by others", extra={"sessions": expired.passed_over})
            return


async def _rest(stop: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), seconds)
