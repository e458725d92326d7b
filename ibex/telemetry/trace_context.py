"""The trace a request belongs to, as W3C's `traceparent` carries it in and out."""

import os
import re
from dataclasses import dataclass

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


def parse_traceparent(header: str) -> tuple[int, int, int] | None:
    """Trace id, the caller's span id, and its flags; None for what is not a valid `traceparent` of version 00."""
    match = _TRACEPARENT.fullmatch(header)
    if match is None:
        return None
    trace_id, span_id, flags = (int(part, 16) for part in match.groups())
    return (trace_id, span_id, flags) if trace_id and span_id else None


def random_id(bits: int) -> int:
    """A random id of so many bits that is not 0."""
    return int.from_bytes(os.urandom(bits // 8), "big") or 1
