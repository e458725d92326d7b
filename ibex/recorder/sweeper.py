"""Sessions nobody has used for long are marked as abandoned; their next turn reopens them."""

import asyncio
import logging
from contextlib import suppress
from datetime import timedelta

from ibex.errors import StoreError
from ibex.stores.sessions import SessionStore
from ibex.telemetry import Metrics

log = logging.getLogger("ibex.recorder")

_EVERY_SECONDS = 60.0


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
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), _EVERY_SECONDS)
