"""What grows old in Postgres: sessions nobody uses are marked as abandoned, changes everybody has heard are pruned."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta

from ibex.errors import StoreError
from ibex.stores.postgres.sessions import SessionStore
from ibex.telemetry import Metrics

log = logging.getLogger("ibex.recorder")

_SWEEP_SECONDS = 60.0
_PRUNE_SECONDS = 3600.0


async def sweep_sessions(sessions: SessionStore, idle: timedelta, metrics: Metrics, stop: asyncio.Event) -> None:
    """Each minute until `stop`: abandon sessions idle for longer."""
    while not stop.is_set():
        try:
            abandoned = await sessions.abandon_idle(idle)
        except StoreError as error:
            metrics.session_sweeper_runs_total.labels("error").inc()
            log.warning("sessions not swept", extra={"reason": error.message})
        else:
            metrics.session_sweeper_runs_total.labels("ok").inc()
            metrics.session_sweeper_marked_total.labels("abandoned").inc(abandoned)
        await _rest(stop, _SWEEP_SECONDS)


async def prune_old_changes(prune: Callable[[], Awaitable[int]], stop: asyncio.Event) -> None:
    """Each hour until `stop`: delete changes that every process has long heard of."""
    while not stop.is_set():
        try:
            await prune()
        except StoreError as error:
            log.warning("changes not pruned", extra={"reason": error.message})
        await _rest(stop, _PRUNE_SECONDS)


async def _rest(stop: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), seconds)
