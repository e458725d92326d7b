"""A request as it came in: what the edge reads of it before any route, and its body within the limits."""

import asyncio
import ipaddress
import re
from dataclasses import dataclass, field
from urllib.parse import urlsplit
from uuid import UUID

from aiohttp import StreamReader
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_protocol import RequestHandler, RequestPayloadError
from multidict import CIMultiDictProxy

from ibex.config import Settings
from ibex.domain.identity import parse_uuid
from ibex.domain.turns import mint_uuid7
from ibex.errors import HeadersTooLarge, PayloadTooLarge, RequestTimeout, UnsupportedMediaType, ValidationFailed
from ibex.telemetry import RequestTrace, StageClock

MAX_HEAD_BYTES = 32 << 10
MAX_FIELD_BYTES = 16 << 10

_HOST = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=%-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?", re.ASCII)

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(slots=True)
class Inbound:
    """One request on one connection."""

    method: str
    path: str
    headers: CIMultiDictProxy[str]
    payload: StreamReader
    protocol: RequestHandler
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


def choose_request_id(header: str | None) -> UUID:
    """The client's id when it is a UUID of version 4 or 7, else a new one."""
    given = parse_uuid(header) if header else None
    return given if given is not None and given.version in {4, 7} else mint_uuid7()


def read_path(target: str) -> str:
    """The path of a request target, without its query; of an absolute one too."""
    if not target.startswith("/"):
        target = urlsplit(target).path
    return target.partition("?")[0].partition("#")[0]


def check_head(
    headers: CIMultiDictProxy[str], raw_headers: tuple[tuple[bytes, bytes], ...], *, needs_host: bool
) -> None:
    """Refuse a head that two servers could read differently, or that is too large."""
    sizes = [len(name) + len(value) for name, value in raw_headers]
    if sum(sizes) > MAX_HEAD_BYTES or max(sizes, default=0) > MAX_FIELD_BYTES:
        raise HeadersTooLarge
    hosts = headers.getall("Host", ())
    if (needs_host and len(hosts) != 1) or any(_HOST.fullmatch(host) is None for host in hosts):
        raise ValidationFailed("The request needs exactly one valid `Host`.", param="Host")


def find_address(peer: str, headers: CIMultiDictProxy[str], trusted: tuple[Network, ...]) -> str:
    """The client's address: the peer's, or the rightmost hop of X-Forwarded-For that no trusted proxy added."""
    if not trusted or not _is_trusted(peer, trusted):
        return peer
    hops = [hop.strip() for line in headers.getall("X-Forwarded-For", ()) for hop in line.split(",")]
    for hop in reversed(hops):
        if not _is_trusted(hop, trusted):
            return hop if _is_address(hop) else peer
    return peer


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is_trusted(text: str, trusted: tuple[Network, ...]) -> bool:
    return _is_address(text) and any(ipaddress.ip_address(text) in network for network in trusted)


def check_declared_body(inbound: Inbound, settings: Settings) -> None:
    """Judge the body by what the head says of it: its size, then its type."""
    headers = inbound.headers
    length = headers.get("Content-Length")
    if length is not None and int(length) > settings.max_body_bytes:
        raise _too_large(settings)
    media_type = headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" or headers.get("Content-Encoding", "identity").strip().lower() != "identity":
        raise UnsupportedMediaType


async def read_body(inbound: Inbound, settings: Settings) -> bytes:
    """The whole body, at most `max_body_bytes` and within `body_seconds`."""
    payload = inbound.payload
    try:
        if payload.is_eof():
            body = payload.read_nowait()
            if len(body) > settings.max_body_bytes:
                raise _too_large(settings)
            return body
        _continue_if_expected(inbound)
        async with asyncio.timeout(settings.body_seconds):
            return await _collect(payload, settings)
    except TimeoutError:
        raise RequestTimeout("The body did not arrive in time.") from None
    except (RequestPayloadError, HttpProcessingError):
        raise ValidationFailed("The body is not framed as HTTP/1.1 demands.") from None


async def _collect(payload: StreamReader, settings: Settings) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while chunk := await payload.readany():
        size += len(chunk)
        if size > settings.max_body_bytes:
            raise _too_large(settings)
        chunks.append(chunk)
    return b"".join(chunks)


def _continue_if_expected(inbound: Inbound) -> None:
    if inbound.headers.get("Expect", "").lower() == "100-continue" and inbound.protocol.transport is not None:
        inbound.protocol.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


def _too_large(settings: Settings) -> PayloadTooLarge:
    return PayloadTooLarge(f"The body is larger than {settings.max_body_bytes:,} bytes.")
