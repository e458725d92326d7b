"""The end of a turn: however it comes, it happens once, and one place turns it into a journal entry."""

import asyncio
from hashlib import sha256
from time import perf_counter
from uuid import UUID

import msgspec

from ibex.domain.completions import Usage
from ibex.domain.turns import Outcome, Turn, TurnId
from ibex.errors import RequestError
from ibex.stores.journal.writer import Journal
from ibex.telemetry import Metrics, RequestTrace, Stage, StageClock

CLIENT_LEFT = 499
"""The status recorded for a client that hung up before it was answered, as nginx has it."""
UNKNOWN_USAGE = Usage()


class TurnFacts(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What is known of a turn before it goes to the provider."""

    turn_id: TurnId
    request_id: UUID
    org_id: UUID
    agent_id: UUID
    external_id: str
    model: str
    model_label: str
    """The model as a metric's label: from a closed set."""
    provider: str
    is_streaming: bool
    directive_version: int | None
    messages: bytes
    replay_of: UUID | None = None


class OpenTurn:
    """A turn under way: a latch. The first ending wins, in one synchronous step; later ones do nothing.

    Each `close_…` puts the turn into the journal without an await, because cancellation can come at any await, and
    returns the future of its commit; None when another ending was first.
    """

    def __init__(
        self,
        facts: TurnFacts,
        clock: StageClock,
        journal: Journal,
        metrics: Metrics,
        *,
        captures_content: bool,
        trace: RequestTrace | None = None,
    ) -> None:
        self.facts = facts
        self._clock = clock
        self._trace = trace
        self._journal = journal
        self._metrics = metrics
        self._captured: list[bytes] | None = [] if captures_content else None
        self._digest = sha256()
        self._started = perf_counter()
        self._is_closed = False
        self.attempts = 0
        self.provider_ttfb: float | None = None
        """Seconds from the request to the first byte of the provider's answer."""
        self.provider_request_id: str | None = None
        self.hides_usage = False
        """Whether the provider was asked for a stream's usage by ibex alone."""

    def note(self, data: bytes) -> None:
        """Count bytes of the reply towards its digest (and keep them, with content capture)."""
        self._digest.update(data)
        if self._captured is not None:
            self._captured.append(data)

    def close_whole(self, usage: Usage) -> asyncio.Future[None] | None:
        """The reply is whole and will be handed on. What happens to the client's socket afterwards changes nothing."""
        return self._close(Outcome.OK, 200, usage, is_complete=True, has_checkpoint=True)

    def close_cut(self, error: RequestError) -> asyncio.Future[None] | None:
        """The provider broke off after the client had seen the first byte."""
        return self._close(Outcome.INCOMPLETE, 200, UNKNOWN_USAGE, has_checkpoint=True, error_code=error.code)

    def close_left(self, *, after_first_byte: bool) -> asyncio.Future[None] | None:
        """The client hung up."""
        self._end_provider_stage()
        status = 200 if after_first_byte else CLIENT_LEFT
        return self._close(Outcome.CLIENT_DISCONNECT, status, UNKNOWN_USAGE, has_checkpoint=after_first_byte)

    def close_refused(self, error: RequestError) -> asyncio.Future[None] | None:
        """The provider failed or refused before the first byte."""
        self._end_provider_stage()
        return self._close(
            Outcome.PROVIDER_ERROR, error.http_status, UNKNOWN_USAGE, has_checkpoint=False, error_code=error.code
        )

    def close_replayed(self) -> asyncio.Future[None] | None:
        """A stored reply was given again; nothing went to the provider."""
        return self._close(Outcome.REPLAYED, 200, UNKNOWN_USAGE, is_complete=True, has_checkpoint=False)

    def _end_provider_stage(self) -> None:
        """What was waited for a provider that did not answer is the provider's time, not ibex's own."""
        if not self._clock.ended(Stage.PROVIDER):
            self._clock.finish(Stage.PROVIDER)

    def _close(
        self,
        outcome: Outcome,
        status: int,
        usage: Usage,
        *,
        has_checkpoint: bool,
        is_complete: bool = False,
        error_code: str | None = None,
    ) -> asyncio.Future[None] | None:
        if self._is_closed:
            return None
        self._is_closed = True
        self._count(outcome, usage)
        turn = self._to_turn(outcome, status, usage, has_checkpoint, is_complete, error_code)
        if self._trace is not None:
            self._trace.turn = turn
        return self._journal.record(turn)

    def _to_turn(
        self,
        outcome: Outcome,
        status: int,
        usage: Usage,
        has_checkpoint: bool,
        is_complete: bool,
        error_code: str | None,
    ) -> Turn:
        facts, clock, moment = self.facts, self._clock, perf_counter()
        captured = self._captured if has_checkpoint else None
        head_out = clock.first_byte_out or moment
        overhead = max(0.0, head_out - clock.started - clock.seconds(Stage.PROVIDER))
        wall_started = int(clock.wall_started * 1e6)
        return Turn(
            turn_id=facts.turn_id,
            request_id=facts.request_id,
            org_id=facts.org_id,
            agent_id=facts.agent_id,
            external_id=facts.external_id,
            outcome=outcome,
            has_checkpoint=has_checkpoint,
            is_complete=is_complete,
            is_streaming=facts.is_streaming,
            status_code=status,
            error_code=error_code,
            replay_of=facts.replay_of,
            model=facts.model,
            provider=facts.provider,
            provider_request_id=self.provider_request_id,
            directive_version=facts.directive_version,
            attempts=self.attempts,
            messages_sha256=sha256(facts.messages).digest() if has_checkpoint else b"",
            completion_sha256=self._digest.digest() if has_checkpoint else None,
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            cached_tokens=usage.cached_tokens,
            total_tokens=usage.total_tokens,
            usage_source=usage.source,
            requested_at=wall_started,
            started_at=wall_started + int((self._started - clock.started) * 1e6),
            completed_at=wall_started + int((moment - clock.started) * 1e6),
            auth_latency_us=int(clock.seconds(Stage.AUTHENTICATION) * 1e6),
            rate_limit_latency_us=int(clock.seconds(Stage.RATE_LIMIT) * 1e6),
            directive_latency_us=int(clock.seconds(Stage.DIRECTIVE) * 1e6),
            overhead_latency_us=int(overhead * 1e6),
            provider_ttfb_ms=None if self.provider_ttfb is None else self.provider_ttfb * 1e3,
            provider_latency_ms=(moment - self._started) * 1e3,
            total_latency_ms=(moment - clock.started) * 1e3,
            messages=facts.messages if captured is not None else None,
            completion=b"".join(captured) if captured is not None else None,
        )

    def _count(self, outcome: Outcome, usage: Usage) -> None:
        facts, metrics = self.facts, self._metrics
        for direction, tokens in (("input", usage.input_tokens), ("output", usage.output_tokens)):
            if tokens:
                metrics.tokens_total.labels(facts.provider, facts.model_label, direction).inc(tokens)
        if not facts.is_streaming or outcome is Outcome.REPLAYED:
            return
        status = "error" if outcome is Outcome.PROVIDER_ERROR else str(outcome)
        metrics.stream_duration_seconds.labels(facts.provider, status).observe(perf_counter() - self._started)
        if outcome is Outcome.CLIENT_DISCONNECT:
            metrics.stream_client_disconnects_total.inc()
        elif outcome is Outcome.INCOMPLETE:
            metrics.stream_upstream_disconnects_total.inc()
