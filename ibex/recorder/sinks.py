"""Where turns are delivered to: checkpoints to Postgres, traces to ClickHouse, each turn once in each."""

import time
from collections.abc import Sequence
from hashlib import sha256
from typing import Protocol
from uuid import UUID

from ibex.domain.turns import Turn
from ibex.errors import StoreRefused, StoreUnavailable
from ibex.recorder.take_backs import TakeBacks, count_dropped
from ibex.stores.clickhouse.traces import TraceStore
from ibex.stores.postgres.sessions import ORGANIZATION_GONE, SessionStore
from ibex.telemetry import Metrics


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
        count_dropped(self._metrics, self.name, len(result.refused) - len(refused))
        return refused


class TraceSink:
    """ClickHouse. It has no unique keys: the batch's token makes a repetition harmless for as long as it is remembered,
    and where it may not be, the turns are looked up first.
    """

    name = "clickhouse"
    spacing = 0.2
    max_turns = 10_000

    def __init__(self, traces: TraceStore, metrics: Metrics, take_backs: TakeBacks) -> None:
        self._traces = traces
        self._metrics = metrics
        self._take_backs = take_backs
        self._token = ""
        self._left_out: frozenset[UUID] = frozenset()
        """Organizations left out of the batch with this token."""

    def wants(self, turn: Turn) -> bool:  # noqa: ARG002
        """Every turn."""
        return True

    async def send(self, turns: Sequence[Turn], *, token: str, is_doubtful: bool) -> list[tuple[Turn, str]]:
        """Store traces as one block, but for those of organizations that are known to be erased."""
        left_out = self._leave_out(token)
        rest = [turn for turn in turns if turn.org_id not in left_out]
        if is_doubtful and (found := await self._traces.find(rest)):
            rest = [turn for turn in rest if turn.turn_id not in found]
            token = _name_rest(token, rest)
        refused = await self._insert(rest, token) if rest else []
        # All that may be stored, also by a recorder before this one. It is asked about after the insert: an erasure
        # that is not known by then deletes, when it comes to that, what was inserted.
        self._take_backs.owe([turn for turn in turns if is_doubtful or turn.org_id not in left_out])
        if not is_doubtful:
            count_dropped(self._metrics, self.name, sum(turn.org_id in left_out for turn in turns))
        return refused

    def _leave_out(self, token: str) -> frozenset[UUID]:
        """The organizations to leave out of a batch, the same at each attempt, so that its halves have the same names.

        What is left keeps the batch's token: stored with the whole batch or without those who must not be there, it is
        stored, and ClickHouse is right to drop it.
        """
        if token != self._token:
            self._token, self._left_out = token, self._take_backs.erased
        return self._left_out

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


def _name_rest(token: str, turns: Sequence[Turn]) -> str:
    """The token of what is left of a batch: under the batch's own, ClickHouse would drop it in silence."""
    return sha256(b"".join((token.encode(), *(turn.turn_id.bytes for turn in turns)))).hexdigest()
