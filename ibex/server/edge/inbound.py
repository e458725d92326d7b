"""A request as it came in, and its body within the limits of size, time and rate."""

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import UUID

from aiohttp import StreamReader
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_protocol import RequestPayloadError

from ibex.config import Settings
from ibex.errors import PayloadTooLarge, RequestTimeout, UnsupportedMediaType, ValidationFailed
from ibex.server.edge.head import RequestHead
from ibex.server.edge.repeats import Payload, WholeBody
from ibex.telemetry import RequestTrace, StageClock

if TYPE_CHECKING:
    from ibex.server.edge.protocol import EdgeProtocol

BODY_GRACE_SHARE = 1 / 6
"""The share of `body_seconds` in which a body may be as slow as it likes to begin; then its rate counts."""


@dataclass(slots=True, repr=False)
class Inbound:
    """One request on one connection."""

    head: RequestHead
    payload: Payload
    protocol: "EdgeProtocol"
    address: str
    request_id: UUID
    clock: StageClock
    trace: RequestTrace | None
    reply_headers: dict[str, str] = field(default_factory=dict)
    """Headers of the response, as they become known; an error carries them too."""

    @property
    def has_unread_body(self) -> bool:
        """Whether bytes of the body are still to come."""
        return not self.payload.is_eof()

    def log_facts(self) -> dict[str, Any]:
        """What log lines say of it (`ibex.telemetry.request_scope`)."""
        facts = {"request_id": str(self.request_id)}
        if "X-IBEX-Turn-ID" in self.reply_headers:
            facts["turn_id"] = self.reply_headers["X-IBEX-Turn-ID"]
        if self.trace is not None:
            facts["trace_id"] = self.trace.trace_id_hex
        return facts


def check_declared_body(inbound: Inbound, settings: Settings) -> None:
    """Judge the body by what the head says of it: its size, then its type."""
    head, payload = inbound.head, inbound.payload
    length = payload.size if isinstance(payload, WholeBody) else head.content_length
    if length is not None and length > settings.max_body_bytes:
        raise _too_large(settings)
    if head.media_type != "application/json" or head.is_coded:
        raise UnsupportedMediaType


async def read_body(inbound: Inbound, settings: Settings) -> bytes:
    """The whole body, at most `max_body_bytes`, within `body_seconds` and at `body_bytes_per_second` at least."""
    payload = inbound.payload
    try:
        if isinstance(payload, WholeBody) or payload.is_eof():
            body = payload.read_nowait()
            if len(body) > settings.max_body_bytes:
                raise _too_large(settings)
            return body
        if inbound.protocol.transport is None:
            raise ConnectionResetError("the client has left")
        _continue_if_expected(inbound)
        return await _collect(payload, settings)
    except TimeoutError:
        raise RequestTimeout("The body did not arrive in time.") from None
    except (RequestPayloadError, HttpProcessingError):
        raise ValidationFailed("The body is not framed as HTTP/1.1 demands.") from None


async def _collect(payload: StreamReader, settings: Settings) -> bytes:
    """Read to the end; each piece puts the deadline off by what the least rate allows, up to `body_seconds`."""
    chunks: list[bytes] = []
    size = 0
    began = asyncio.get_running_loop().time()
    rated_from = began + settings.body_seconds * BODY_GRACE_SHARE
    last_moment = began + settings.body_seconds
    async with asyncio.timeout_at(rated_from) as deadline:
        while chunk := await payload.readany():
            size += len(chunk)
            if size > settings.max_body_bytes:
                raise _too_large(settings)
            chunks.append(chunk)
            deadline.reschedule(min(last_moment, rated_from + size / settings.body_bytes_per_second))
    return b"".join(chunks)


def _continue_if_expected(inbound: Inbound) -> None:
    is_expected = not inbound.head.is_http10 and inbound.head.headers.get("Expect", "").lower() == "100-continue"
    if is_expected and inbound.protocol.transport is not None:
        inbound.protocol.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


def _too_large(settings: Settings) -> PayloadTooLarge:
    return PayloadTooLarge(f"The body is larger than {settings.max_body_bytes:,} bytes.")
