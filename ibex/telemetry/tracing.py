"""Which requests leave spans: those their caller samples, else some by chance, and every failed one."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ibex.config import Settings
from ibex.domain.turns import Outcome
from ibex.telemetry.metrics import Metrics
from ibex.telemetry.stages import StageClock
from ibex.telemetry.trace_context import RANDOM, SAMPLED, RequestFacts, RequestTrace, random_id, read_caller

if TYPE_CHECKING:
    from ibex.telemetry.span_queue import SpanQueue
    from ibex.telemetry.spans import SpanMaker

FAILED = frozenset({Outcome.INCOMPLETE, Outcome.PROVIDER_ERROR})
"""Ends of a turn whose spans are kept whatever was decided when it began."""


class Tracing:
    """Begins the trace of each request, and makes the spans of those that are kept when they are over.

    Until then a request carries a handful of numbers: nothing of OpenTelemetry's. Without a collector it is not even
    imported.
    """

    def __init__(self, settings: Settings, process: str, metrics: Metrics) -> None:
        """Raises ConfigurationError when spans cannot be exported as the settings say."""
        self._threshold = round(settings.otel_sample_ratio * (1 << 64))
        self._maker: SpanMaker | None = None
        self._queue: SpanQueue | None = None
        if settings.otel_exports:
            from ibex.telemetry import exporters, span_queue, spans

            self._maker = spans.SpanMaker(settings, process)
            self._queue = span_queue.SpanQueue(exporters.open_exporter(settings), metrics)

    def begin(self, headers: Mapping[str, str]) -> RequestTrace | None:
        """The trace of a request: its caller's, else a new one when spans are exported, else none."""
        exports = self._queue is not None
        trace = read_caller(headers, exports=exports)
        if trace is not None or not exports:
            return trace
        trace_id = random_id(128)
        is_sampled = trace_id & 0xFFFFFFFFFFFFFFFF < self._threshold
        return RequestTrace(trace_id, 0, RANDOM | SAMPLED if is_sampled else RANDOM, None, exports=True)

    def keeps(self, trace: RequestTrace, status: int) -> bool:
        """Whether a request that is over leaves spans: a failed one does even if its caller does not sample."""
        if not trace.is_exporting:
            return False
        return trace.is_sampled or status >= 500 or (trace.turn is not None and trace.turn.outcome in FAILED)

    def record(self, trace: RequestTrace, clock: StageClock, request: RequestFacts) -> None:
        """Make the spans of a request that is over, and hand them to the exporter's thread; never waits."""
        if self._maker is not None and self._queue is not None:
            self._queue.offer(self._maker.make(trace, clock, request))

    async def close(self) -> None:
        """Send what is still waiting, for at most two seconds."""
        if self._queue is not None:
            await self._queue.close()
