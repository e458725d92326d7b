"""Spans: W3C trace context in and out, sampling by parent, and no span object at all for a request not sampled."""

import os
import random
import re
from dataclasses import dataclass
from typing import ClassVar

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

from ibex import __version__
from ibex.config import Settings
from ibex.telemetry.stages import Stage, StageClock

_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})", re.ASCII)


@dataclass(frozen=True, slots=True)
class RequestTrace:
    """The trace a request belongs to. `parent_span_id` is the caller's span, 0 when the trace starts here."""

    trace_id: int
    parent_span_id: int
    span_id: int
    is_sampled: bool

    @property
    def trace_id_hex(self) -> str:
        """As `X-Trace-ID` shows it."""
        return f"{self.trace_id:032x}"

    @property
    def traceparent(self) -> str:
        """What goes on to the provider: this request's span as the parent, or the caller's when none is kept here."""
        parent = self.span_id if self.is_sampled else self.parent_span_id or self.span_id
        return f"00-{self.trace_id:032x}-{parent:016x}-{'01' if self.is_sampled else '00'}"


class Tracing:
    """Decides which requests leave spans, and exports them in the background. Without a collector nothing is made."""

    def __init__(self, settings: Settings, process: str) -> None:
        self._ratio = settings.otel_sample_ratio
        self._provider: TracerProvider | None = None
        if settings.otel_endpoint:
            resource = Resource.create(
                {"service.name": "ibex", "service.version": __version__, "ibex.process": process}
            )
            self._provider = TracerProvider(resource=resource, id_generator=_Ids())
            endpoint = settings.otel_endpoint.rstrip("/") + "/v1/traces"
            self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
            self._tracer = self._provider.get_tracer("ibex", __version__)

    def begin(self, traceparent: str | None) -> RequestTrace | None:
        """The trace of a request: its caller's, else a new one when spans are exported, else none."""
        match = _TRACEPARENT.fullmatch(traceparent) if traceparent else None
        if match is not None and int(match[1], 16) and int(match[2], 16):
            is_sampled = bool(int(match[3], 16) & 1) and self._provider is not None
            return RequestTrace(int(match[1], 16), int(match[2], 16), _random_bits(64), is_sampled)
        if self._provider is None:
            return None
        return RequestTrace(_random_bits(128), 0, _random_bits(64), random.random() < self._ratio)  # noqa: S311

    def record(
        self, request: RequestTrace, clock: StageClock, name: str, attributes: dict[str, str | int], status: int
    ) -> None:
        """Make a sampled request's spans: one for the request, one for each stage it reached."""
        if self._provider is None or not request.is_sampled:
            return
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
        for stage, (begun, ended) in clock.spent.items():
            kind = trace.SpanKind.CLIENT if stage is Stage.PROVIDER else trace.SpanKind.INTERNAL
            child = self._tracer.start_span(str(stage), context=inner, kind=kind, start_time=_nanoseconds(clock, begun))
            child.end(end_time=_nanoseconds(clock, ended))
        if status >= 500:
            span.set_status(trace.StatusCode.ERROR)
        span.end(end_time=int(clock.wall_now() * 1e9))

    def close(self) -> None:
        """Send what is still buffered."""
        if self._provider is not None:
            self._provider.shutdown()


class _Ids(RandomIdGenerator):
    """Random ids, but for a request's own span, whose ids were given out in `traceparent` before the span was made."""

    preset: ClassVar[tuple[int, int] | None] = None

    def generate_trace_id(self) -> int:
        return self.preset[0] if self.preset else super().generate_trace_id()

    def generate_span_id(self) -> int:
        return self.preset[1] if self.preset else super().generate_span_id()


def _random_bits(bits: int) -> int:
    return int.from_bytes(os.urandom(bits // 8), "big") or 1


def _nanoseconds(clock: StageClock, moment: float) -> int:
    return int((clock.wall_started + moment - clock.started) * 1e9)
