"""What is taken back: traces that were delivered although their organization had been erased by then."""

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from time import monotonic
from uuid import UUID

from ibex.domain.turns import Turn
from ibex.errors import StoreError
from ibex.stores.clickhouse.erasure import TraceErasure
from ibex.telemetry import Metrics

log = logging.getLogger("ibex.recorder")

_SETTLE_SECONDS = 2.0
_SWEEP_SECONDS = 600.0
_ERASURE_TIME = timedelta(minutes=10)
"""A sweep leaves younger erasures alone: they are deleting themselves, and count what they delete."""


class TakeBacks:
    """Owes a look at each organization that traces were delivered of, and the deletion of what erased ones had.

    Apart from the delivery: a look-up that fails holds back nobody's traces, and a backlog of an erased organization
    costs one deletion every few seconds. What is owed is in memory; what a killed recorder owed is found by a sweep, at
    the next start and every ten minutes, on whatever node.
    """

    def __init__(self, erasure: TraceErasure, metrics: Metrics, *, erasure_time: timedelta = _ERASURE_TIME) -> None:
        self._erasure = erasure
        self._metrics = metrics
        self._erasure_time = erasure_time
        self._owed: Counter[UUID] = Counter()
        self._erased: set[UUID] = set()
        self._swept_at: float | None = None
        self._is_failing = False

    @property
    def erased(self) -> frozenset[UUID]:
        """Organizations that are known to be erased: an erasure is for ever."""
        return frozenset(self._erased)

    def owe(self, turns: Sequence[Turn]) -> None:
        """These have been stored; their organizations are asked about from now on, not before."""
        self._owed.update(turn.org_id for turn in turns)

    async def settle(self) -> None:
        """Delete the traces of those that turn out to be erased. Raises StoreError; then everything is owed still."""
        asked, self._owed = self._owed, Counter()
        is_settled = False
        try:
            erased = await self._erasure.find(asked)
            if erased:
                await self._erasure.delete(erased)
            is_settled = True
        finally:
            if not is_settled:
                self._owed.update(asked)
        self._erased |= erased
        count_dropped(self._metrics, "clickhouse", sum(asked[org_id] for org_id in erased))

    async def sweep(self) -> None:
        """Delete what any recorder owed when it died. Raises StoreError."""
        left = await self._erasure.find_left(self._erasure_time)
        if left:
            await self._erasure.delete(left)
            self._erased |= left
            log.warning("traces of erased organizations found and deleted", extra={"organizations": len(left)})

    async def run(self, stop: asyncio.Event) -> None:
        """Settle every few seconds until `stop`, and sweep now and then."""
        while not stop.is_set():
            try:
                await self.settle()
                if self._swept_at is None or monotonic() - self._swept_at > _SWEEP_SECONDS:
                    await self.sweep()
                    self._swept_at = monotonic()
            except StoreError as error:
                self._report(error)
            else:
                self._report(None)
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), _SETTLE_SECONDS)

    def _report(self, error: StoreError | None) -> None:
        """Log a change of state, not every failure."""
        if error is not None and not self._is_failing:
            log.warning("traces not compared with erasures; owed", extra={"reason": error.message})
        self._is_failing = error is not None


def count_dropped(metrics: Metrics, store: str, turns: int) -> None:
    """Turns of erased organizations: nobody is left to ask for them."""
    if turns:
        metrics.erased_turns_dropped_total.labels(store).inc(turns)
        log.warning("turns of erased organizations dropped", extra={"sink": store, "turns": turns})
