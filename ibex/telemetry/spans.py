"""Spans of sampled requests, made from the stage clock when a request is over, and exported in the background."""

from typing import ClassVar

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

from ibex import __version__
from ibex.telemetry.stages import Stage, StageClock
from ibex.telemetry.trace_context import RequestTrace


class SpanExporter:
    """Sends spans to an OTLP/HTTP collector."""

    def __init__(self, endpoint: str, process: str) -> None:
        resource = Resource.create({"service.name": "ibex", "service.version": __version__, "ibex.process": process})
        self._provider = TracerProvider(resource=resource, id_generator=_Ids())
        exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + "/v1/traces")
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("ibex", __version__)

    def record(
        self, request: RequestTrace, clock: StageClock, name: str, attributes: dict[str, str | int], status: int
    ) -> None:
        """Make a request's spans: one for itself, one for each stage it reached."""
        parent = trace.SpanContext(
            request.trace_id, request.parent_span_id, is_remote=True, trace_flags=trace.TraceFlags(1)
        )
        context = trace.set_span_in_context(trace.NonRecordingSpan(parent)) if request.parent_span_id else None
        _Ids.preset = (request.trace_id, request.span_id)
        span = self._tracer.start_span(
            name,
            context=context,
            kind=trace.SpanKind.SERVER,
            attributes={**attributes, "http.response.status_code": status},
            start_time=_nanoseconds(clock, clock.started),
        )
        _Ids.preset = None
        inner = trace.set_span_in_context(span)
        for stage, begun, ended in clock.spans():
            kind = trace.SpanKind.CLIENT if stage is Stage.PROVIDER else trace.SpanKind.INTERNAL
            child = self._tracer.start_span(
                stage.label, context=inner, kind=kind, start_time=_nanoseconds(clock, begun)
            )
            child.end(end_time=_nanoseconds(clock, ended))
        if status >= 500:
            span.set_status(trace.StatusCode.ERROR)
        span.end(end_time=int(clock.wall_now() * 1e9))

    def close(self) -> None:
        """Send what is still buffered."""
        self._provider.shutdown()


class _Ids(RandomIdGenerator):
    """Random ids, but for a request's own span, whose ids were given out in `traceparent` before the span was made."""

    preset: ClassVar[tuple[int, int] | None] = None

    def generate_trace_id(self) -> int:
        return self.preset[0] if self.preset else super().generate_trace_id()

    def generate_span_id(self) -> int:
        return self.preset[1] if self.preset else super().generate_span_id()


def _nanoseconds(clock: StageClock, moment: float) -> int:
    return int((clock.wall_started + moment - clock.started) * 1e9)
