"""Which requests leave spans: sampled by their parent, else by chance; without a collector, none."""

import random
from typing import TYPE_CHECKING

from ibex.config import Settings
from ibex.telemetry.stages import StageClock
from ibex.telemetry.trace_context import RequestTrace, parse_traceparent, random_id

if TYPE_CHECKING:
    from ibex.telemetry.spans import SpanExporter


class Tracing:
    """Begins the trace of each request. Without a collector OpenTelemetry is not even imported."""

    def __init__(self, settings: Settings, process: str) -> None:
        self._ratio = settings.otel_sample_ratio
        self._exporter: SpanExporter | None = None
        if settings.otel_endpoint:
            from ibex.telemetry import spans

            self._exporter = spans.SpanExporter(settings.otel_endpoint, process)

    def begin(self, traceparent: str | None) -> RequestTrace | None:
        """The trace of a request: its caller's, else a new one when spans are exported, else none."""
        parent = parse_traceparent(traceparent) if traceparent else None
        if parent is not None:
            trace_id, span_id, flags = parent
            return RequestTrace(trace_id, span_id, random_id(64), bool(flags & 1) and self._exporter is not None, flags)
        if self._exporter is None:
            return None
        return RequestTrace(random_id(128), 0, random_id(64), random.random() < self._ratio)  # noqa: S311

    def record(
        self, request: RequestTrace, clock: StageClock, name: str, attributes: dict[str, str | int], status: int
    ) -> None:
        """Make a sampled request's spans."""
        if self._exporter is not None and request.is_sampled:
            self._exporter.record(request, clock, name, attributes, status)

    def close(self) -> None:
        """Send what is still buffered."""
        if self._exporter is not None:
            self._exporter.close()
