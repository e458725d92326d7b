"""The trace a request belongs to: W3C context in and out, sampling by parent, and no span where none is kept."""

import os
import random
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ibex.config import Settings
from ibex.telemetry.stages import StageClock

if TYPE_CHECKING:
    from ibex.telemetry.spans import SpanExporter

_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})", re.ASCII)


@dataclass(frozen=True, slots=True)
class RequestTrace:
    """The trace a request belongs to. `parent_span_id` is the caller's span, 0 when the trace starts here."""

    trace_id: int
    parent_span_id: int
    span_id: int
    is_sampled: bool
    """Whether this request leaves spans here."""
    parent_flags: int = 0
    """The caller's trace flags."""

    @property
    def trace_id_hex(self) -> str:
        """As `X-Trace-ID` shows it."""
        return f"{self.trace_id:032x}"

    @property
    def traceparent(self) -> str:
        """What goes on to the provider: this request's span as the parent, or the caller's words when none is kept."""
        if self.is_sampled or not self.parent_span_id:
            return f"00-{self.trace_id:032x}-{self.span_id:016x}-{int(self.is_sampled):02x}"
        return f"00-{self.trace_id:032x}-{self.parent_span_id:016x}-{self.parent_flags:02x}"


class Tracing:
    """Decides which requests leave spans. Without a collector none does, and OpenTelemetry is not even imported."""

    def __init__(self, settings: Settings, process: str) -> None:
        self._ratio = settings.otel_sample_ratio
        self._exporter: SpanExporter | None = None
        if settings.otel_endpoint:
            from ibex.telemetry import spans

            self._exporter = spans.SpanExporter(settings.otel_endpoint, process)

    def begin(self, traceparent: str | None) -> RequestTrace | None:
        """The trace of a request: its caller's, else a new one when spans are exported, else none."""
        match = _TRACEPARENT.fullmatch(traceparent) if traceparent else None
        if match is not None and int(match[1], 16) and int(match[2], 16):
            flags = int(match[3], 16)
            is_sampled = bool(flags & 1) and self._exporter is not None
            return RequestTrace(int(match[1], 16), int(match[2], 16), _random_bits(64), is_sampled, flags)
        if self._exporter is None:
            return None
        return RequestTrace(_random_bits(128), 0, _random_bits(64), random.random() < self._ratio)  # noqa: S311

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


def _random_bits(bits: int) -> int:
    return int.from_bytes(os.urandom(bits // 8), "big") or 1
