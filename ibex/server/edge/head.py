"""What the edge reads of a request's head before any route does, and the heads it refuses."""

import ipaddress
import re
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from aiohttp.http import HttpVersion10, HttpVersion11
from aiohttp.http_parser import RawRequestMessage
from aiohttp.web_protocol import ERROR as NO_REQUEST
from multidict import CIMultiDict, CIMultiDictProxy

from ibex.domain.identity import parse_uuid
from ibex.domain.turns import mint_uuid7
from ibex.errors import MethodNotAllowed, PayloadTooLarge, RequestError, ValidationFailed

NO_HEADERS: Final[CIMultiDictProxy[str]] = CIMultiDictProxy(CIMultiDict())
"""The headers of bytes that were no request."""

KNOWN_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
ROUTED_METHODS = "GET, HEAD, POST"

_HOST = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=%-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?", re.ASCII)
_ABSOLUTE = re.compile(r"https?://[^/?#]+", re.ASCII | re.IGNORECASE)
_FORWARDABLE = re.compile(r"[ -~]{1,256}", re.ASCII)
_GIVEN_ONCE = ("Authorization", "X-IBEX-Agent-ID", "X-IBEX-Session-ID", "Idempotency-Key")
_MAX_LENGTH_DIGITS = 15
"""A longer Content-Length is beyond any body, and near where parsers' integers end."""

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True, repr=False)
class RequestHead:
    """A request's head, read once; a connection that sends the same head again has it at hand.

    It has no repr of its fields: no log line may ever show a header map.
    """

    method: str
    path: str
    """Without the query."""
    headers: CIMultiDictProxy[str]
    fault: RequestError | None
    """Why it is refused, whatever it asks for."""
    is_http10: bool
    ends_connection: bool
    """Whether no other request may follow it on its connection."""
    media_type: str
    """Of the body: lower-case, without parameters; empty when none is named."""
    is_coded: bool
    """Whether the body has a Content-Encoding other than identity."""
    content_length: int | None
    """Of the body, in bytes; None when the head does not say, or when it differs from one repetition to the next."""

    @classmethod
    def read(cls, message: RawRequestMessage, fault: RequestError | None = None) -> "RequestHead":
        """Read a head that the parser let pass."""
        headers = message.headers or NO_HEADERS
        fault = fault or find_head_fault(message)
        length = headers.get("Content-Length")
        return cls(
            method=message.method,
            path=read_path(message.path),
            headers=headers,
            fault=fault,
            is_http10=message.version < HttpVersion11,
            ends_connection=message.should_close or "Transfer-Encoding" in headers or "Upgrade" in headers,
            media_type=headers.get("Content-Type", "").partition(";")[0].strip().lower(),
            is_coded=any(coding.strip().lower() != "identity" for coding in headers.getall("Content-Encoding", ())),
            content_length=int(length) if length is not None and fault is None else None,
        )

    @classmethod
    def of_no_request(cls, fault: RequestError) -> "RequestHead":
        """What stands for bytes that were no request."""
        return cls.read(NO_REQUEST, fault)


def find_head_fault(message: Any) -> RequestError | None:
    """What is wrong with a head that its parser let pass: another version, or what two servers could read differently.

    None when nothing is. After such a fault nobody knows where the next request begins: it ends the connection.
    """
    version, headers = message.version, message.headers
    if version != HttpVersion11 and version != HttpVersion10:
        return ValidationFailed("The request is not HTTP/1.1 or HTTP/1.0.")
    if message.method == "CONNECT":
        return MethodNotAllowed(headers={"Allow": ROUTED_METHODS})
    hosts = headers.getall("Host", ())
    if len(hosts) != 1 and not (version == HttpVersion10 and not hosts):
        return ValidationFailed("The request needs exactly one `Host`.", param="Host")
    if hosts and _HOST.fullmatch(hosts[0]) is None:
        return ValidationFailed("The request's `Host` is not valid.", param="Host")
    if "#" in message.path or not (message.path.startswith(("/", "*")) or _ABSOLUTE.match(message.path)):
        return ValidationFailed("The request's target is not valid.")
    return _find_framing_fault(message) or _find_repetition(headers)


def _find_framing_fault(message: Any) -> RequestError | None:
    headers = message.headers
    coding = headers.get("Transfer-Encoding")
    if coding is not None and (coding.lower() != "chunked" or message.version == HttpVersion10):
        return ValidationFailed("The only `Transfer-Encoding` there is here is `chunked`, of HTTP/1.1.")
    length = headers.get("Content-Length")
    if length is not None and len(length) > _MAX_LENGTH_DIGITS:
        return PayloadTooLarge()
    return None


def _find_repetition(headers: CIMultiDictProxy[str]) -> RequestError | None:
    for name in _GIVEN_ONCE:
        if len(headers.getall(name, ())) > 1:
            return ValidationFailed(f"`{name}` was given more than once.", param=name)
    return None


def choose_request_id(header: str | None) -> UUID:
    """The client's id when it is a UUID of version 4 or 7, else a new one."""
    given = parse_uuid(header) if header else None
    return given if given is not None and given.version in {4, 7} else mint_uuid7()


def read_path(target: str) -> str:
    """The path of a request target, without its query; of an absolute one too."""
    if not target.startswith("/"):
        authority = _ABSOLUTE.match(target)
        target = target if authority is None else target[authority.end() :]
    return target.partition("?")[0] or "/"


def forwardable(value: str | None) -> str | None:
    """A header's value that may go on to a provider: printable ASCII and short; None for any other."""
    return value if value is not None and _FORWARDABLE.fullmatch(value) else None


def find_address(peer: str, headers: CIMultiDictProxy[str], trusted: tuple[Network, ...]) -> str:
    """The client's address: the peer's, or the rightmost hop of X-Forwarded-For that no trusted proxy added."""
    if not trusted or not is_trusted(peer, trusted):
        return peer
    hops = [hop.strip() for line in headers.getall("X-Forwarded-For", ()) for hop in line.split(",")]
    for hop in reversed(hops):
        if not is_trusted(hop, trusted):
            return hop if _read_address(hop) is not None else peer
    return peer


def is_trusted(text: str, trusted: tuple[Network, ...]) -> bool:
    """Whether an address lies in a trusted network; what is no address does not."""
    address = _read_address(text)
    return address is not None and any(address in network for network in trusted)


def _read_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
