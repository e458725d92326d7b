"""Where turns are delivered to: checkpoints to Postgres, traces to ClickHouse, each turn once in each."""

import logging
import time
from collections.abc import Sequence
from hashlib import sha256
from typing import Protocol

from ibex.domain.turns import Turn
from ibex.errors import StoreRefused, StoreUnavailable
from ibex.stores.clickhouse.traces import TraceStore
from ibex.stores.postgres.sessions import ORGANIZATION_GONE, SessionStore
from ibex.telemetry import Metrics

log = logging.getLogger("ibex.recorder")


class Sink(Protocol):
    """One place that must have every turn it wants, once."""

    name: str
    spacing: float
    """Seconds from the beginning of one batch to the beginning of the next, at least."""
    max_turns: int
    """Turns in a batch, about."""

    def wants(self, turn: Turn) -> bool:
        """Whether this turn belongs here."""
        ...

    async def send(self, turns: Sequence[Turn], *, token: str, is_doubtful: bool) -> list[tuple[Turn, str]]:
        """Store turns; answers those refused for their content, with the reason.

        The token names the batch. `is_doubtful`: some of it may be stored, and the token may be forgotten. Raises
        StoreError when the batch must be sent again later, whole.
        """
        ...


class CheckpointSink:
    """Postgres. A turn's id is the row's primary key, so sending it again does nothing."""

    name = "postgres"
    spacing = 0.02
    max_turns = 5_000

    def __init__(self, sessions: SessionStore, metrics: Metrics) -> None:
        self._sessions = sessions
        self._metrics = metrics

    def wants(self, turn: Turn) -> bool:
        """Endings that leave a checkpoint."""
        return turn.has_checkpoint

    async def send(self, turns: Sequence[Turn], *, token: str, is_doubtful: bool) -> list[tuple[Turn, str]]:  # noqa: ARG002
        """Store checkpoints and their sessions. Those of an erased organization are dropped: nobody is left to ask."""
        result = await self._sessions.record(turns)
        checkpoints, sessions = self._metrics.session_checkpoint_total, self._metrics.session_get_or_create_total
        checkpoints.labels("ok").inc(result.written)
        checkpoints.labels("duplicate").inc(result.duplicates)
        sessions.labels("created").inc(result.sessions_created)
        sessions.labels("found").inc(result.sessions_found)
        refused = [(turn, reason) for turn, reason in result.refused if reason != ORGANIZATION_GONE]
        checkpoints.labels("error").inc(len(refused))
        _count_dropped(self._metrics, self.name, len(result.refused) - len(refused))
        return refused


class TraceSink:
    """ClickHouse. It has no unique keys: the batch's token makes a repetition harmless for as long as it is remembered,
    and where it may not be, the turns are looked up first.
    """

    name = "clickhouse"
    spacing = 0.2
    max_turns = 10_000

    def __init__(self, traces: TraceStore, metrics: Metrics) -> None:
        self._traces = traces
        self._metrics = metrics

    def wants(self, turn: Turn) -> bool:  # noqa: ARG002
        """Every turn."""
        return True

    async def send(self, turns: Sequence[Turn], *, token: str, is_doubtful: bool) -> list[tuple[Turn, str]]:
        """Store traces as one block."""
        if is_doubtful and (found := await self._traces.find(turns)):
            turns = [turn for turn in turns if turn.turn_id not in found]
            token = _name_rest(token, turns)
        refused = await self._insert(turns, token)
        await self._take_back(turns)
        return refused

    async def _take_back(self, turns: Sequence[Turn]) -> None:
        """Delete what an erased organization had in this batch.

        Asked after the insert: an erasure that is not known by now deletes, when it comes to that, what was inserted.
        Nothing is left out before it, since the batch's token names all of it.
        """
        erased = await self._traces.erasure.find(turn.org_id for turn in turns)
        if erased:
            await self._traces.erasure.delete(erased)
            _count_dropped(self._metrics, self.name, sum(turn.org_id in erased for turn in turns))

    async def _insert(self, turns: Sequence[Turn], token: str) -> list[tuple[Turn, str]]:
        """Insert; when ClickHouse refuses, which it does without saying for which row, find that row by halving."""
        started = time.monotonic()
        try:
            await self._traces.insert(turns, token)
        except StoreUnavailable:
            self._metrics.clickhouse_flush_total.labels("error").inc()
            raise
        except StoreRefused as error:
            self._metrics.clickhouse_flush_total.labels("error").inc()
            if len(turns) == 1:
                return [(turns[0], error.message)]
        else:
            self._metrics.clickhouse_flush_total.labels("ok").inc()
            self._metrics.clickhouse_flush_rows.observe(len(turns))
            self._metrics.clickhouse_flush_duration_seconds.observe(time.monotonic() - started)
            return []
        half = len(turns) // 2
        return await self._insert(turns[:half], f"{token}0") + await self._insert(turns[half:], f"{token}1")


def _count_dropped(metrics: Metrics, store: str, turns: int) -> None:
    """Turns of erased organizations: nobody is left to ask for them."""
    if turns:
        metrics.erased_turns_dropped_total.labels(store).inc(turns)
        log.warning("turns of erased organizations dropped", extra={"sink": store, "turns": turns})


def _name_rest(token: str, turns: Sequence[Turn]) -> str:
    """The token of what is left of a batch: under the batch's own, ClickHouse would drop it in silence."""
    return sha256(b"".join((token.encode(), *(turn.turn_id.bytes for turn in turns)))).hexdigest()
