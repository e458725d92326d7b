"""The trace a request belongs to, as W3C's `traceparent` and `tracestate` carry it in and out."""

import random
import re
from collections.abc import Mapping
from typing import NamedTuple
from uuid import UUID

from ibex.domain.completions import ReplyFacts
from ibex.domain.turns import Turn

SAMPLED, RANDOM = 0x01, 0x02
"""Bits of the trace flags: that spans are kept, and that the trace id is random."""

_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})", re.ASCII)
_TRACESTATE = re.compile(r"[ -~]{1,512}", re.ASCII)


class RequestFacts(NamedTuple):
    """What a request that is over was, and how it ended."""

    method: str
    route: str | None
    """The template of its path; None for a path that matches none."""
    status: int
    error_code: str | None
    """The code of the error it ended with, or was cut off by."""
    request_id: UUID


class RequestTrace:
    """The trace of one request: where it stands in it, and what its spans will tell when it is over."""

    __slots__ = (
        "call_span_id",
        "flags",
        "is_exporting",
        "is_sampled",
        "parent_span_id",
        "reply",
        "span_id",
        "trace_id",
        "tracestate",
        "turn",
    )

    def __init__(
        self, trace_id: int, parent_span_id: int, flags: int, tracestate: str | None, *, exports: bool
    ) -> None:
        self.trace_id = trace_id
        self.parent_span_id = parent_span_id
        """The caller's span; 0 when the trace starts here."""
        self.flags = flags
        self.tracestate = tracestate
        self.is_exporting = exports
        """Whether there is a collector. Without one the caller's words go on unchanged."""
        self.is_sampled = exports and bool(flags & SAMPLED)
        """Whether this request leaves spans however it ends. One that fails leaves them in any case."""
        self.span_id = random_id(64) if exports else 0
        self.call_span_id = random_id(64) if exports else 0
        """Of the span of the model call: the parent that the provider is told."""
        self.turn: Turn | None = None
        """The turn it took, once that has ended."""
        self.reply: ReplyFacts | None = None
        """What a sampled request's reply said of itself."""

    @property
    def has_parent(self) -> bool:
        """Whether the trace began at the caller."""
        return bool(self.parent_span_id)

    @property
    def trace_id_hex(self) -> str:
        """As `X-Trace-ID` shows it."""
        return f"{self.trace_id:032x}"

    @property
    def traceparent(self) -> str:
        """What goes on to the provider."""
        span_id = self.call_span_id or self.parent_span_id
        return f"00-{self.trace_id:032x}-{span_id:016x}-{self.flags:02x}"


def read_caller(headers: Mapping[str, str], *, exports: bool) -> RequestTrace | None:
    """The trace the caller's headers name; None without a valid `traceparent`. A strange `tracestate` is left out."""
    header = headers.get("traceparent")
    parent = parse_traceparent(header) if header is not None else None
    if parent is None:
        return None
    trace_id, span_id, flags = parent
    tracestate = headers.get("tracestate")
    if tracestate is not None and _TRACESTATE.fullmatch(tracestate) is None:
        tracestate = None
    return RequestTrace(trace_id, span_id, flags & (SAMPLED | RANDOM), tracestate, exports=exports)


def parse_traceparent(header: str) -> tuple[int, int, int] | None:
    """Trace id, the caller's span id, and its flags; None for what is not a valid `traceparent` of version 00."""
    match = _TRACEPARENT.fullmatch(header)
    if match is None:
        return None
    trace_id, span_id, flags = (int(part, 16) for part in match.groups())
    return (trace_id, span_id, flags) if trace_id and span_id else None


def random_id(bits: int) -> int:
    """A random id of so many bits that is not 0. It has to be unlike others, not secret: no system call."""
    return random.getrandbits(bits) or 1
