"""Egress through an HTTP proxy: which hosts are reached through it, and how a tunnel is asked for."""

import asyncio
import base64
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, cast
from urllib.parse import unquote, urlsplit

MAX_ANSWER_BYTES: Final = 16 << 10

_STATUS_LINE: Final = re.compile(rb"HTTP/1\.[01] ([0-9]{3})(?: [^\r\n]*)?\r\n")
_BRACKETED: Final = re.compile(r"\[([0-9A-Fa-f:.]+)\](?::([0-9]+))?")

_NO_PROXY_URL: Final = "HTTPS_PROXY is http://[user:password@]host[:port]"


class TunnelRefused(OSError):
    """The egress proxy opened no tunnel to the model provider; `str` of it names neither."""


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy that takes CONNECT."""

    host: str
    port: int
    credentials: str | None = field(default=None, repr=False)
    """`user:password`."""

    def connect_request(self, host: str, port: int) -> bytes:
        """What asks for a tunnel to an upstream, whose name the proxy resolves."""
        authority = f"[{host}]:{port}" if ":" in host else f"{host.encode('idna').decode()}:{port}"
        lines = [f"CONNECT {authority} HTTP/1.1", f"Host: {authority}"]
        if self.credentials is not None:
            lines.append(f"Proxy-Authorization: Basic {base64.b64encode(self.credentials.encode()).decode()}")
        return "\r\n".join([*lines, "", ""]).encode("ascii")


def parse_proxy(url: str) -> Proxy:
    """Read a proxy's URL; raises ValueError, which quotes nothing of it, when it is none."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port = parts.port or 80
    except ValueError:
        raise ValueError(_NO_PROXY_URL) from None
    if parts.scheme != "http" or not parts.hostname or parts.path not in {"", "/"} or parts.query or parts.fragment:
        raise ValueError(_NO_PROXY_URL)
    credentials = None
    if parts.username is not None:
        credentials = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return Proxy(parts.hostname, port, credentials)


def is_exempt(host: str, port: int, no_proxy: Sequence[str]) -> bool:
    """Whether NO_PROXY says that this host is reached directly.

    An entry is `*`, a name (its subdomains are meant as well), a name with a leading dot, an address, or a CIDR; a
    port behind it narrows it down.
    """
    return any(_matches(entry.strip().lower(), host.lower().rstrip("."), port) for entry in no_proxy)


def _matches(entry: str, host: str, port: int) -> bool:
    if entry == "*":
        return True
    bracketed = _BRACKETED.fullmatch(entry)
    if bracketed is not None:
        entry, wanted_port = bracketed[1], bracketed[2] or ""
    else:
        name, _, wanted_port = entry.partition(":")
        if ":" in wanted_port:  # a bare IPv6 address
            wanted_port = ""
        else:
            entry = name
    if wanted_port and wanted_port != str(port):
        return False
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        name = entry.lstrip("*").lstrip(".")
        return bool(name) and (host == name or host.endswith(f".{name}"))


class Tunnel(asyncio.Protocol):
    """Asks a proxy for a tunnel, and keeps watch over it until the transport is given to somebody else."""

    def __init__(self, request: bytes) -> None:
        self.is_spoilt = False
        """Whether it ended, or something was said in it, that nobody had asked for."""
        self._request = request
        self._answer = b""
        self._opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def opened(self) -> None:
        """Return when the proxy says so; raises TunnelRefused when it does not."""
        await self._opened

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast("asyncio.Transport", transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        if self._opened.done():
            self.is_spoilt = True
            return
        self._answer += data
        head, end, rest = self._answer.partition(b"\r\n\r\n")
        if not end:
            if len(self._answer) > MAX_ANSWER_BYTES:
                self._settle(TunnelRefused("The egress proxy opened no tunnel."))
            return
        status = _STATUS_LINE.match(head + end)
        if status is None or not status[1].startswith(b"2") or rest:  # nobody behind the proxy may speak before TLS
            reason = "wants other credentials" if status is not None and status[1] == b"407" else "opened no tunnel"
            self._settle(TunnelRefused(f"The egress proxy {reason}."))
            return
        self._settle(None)

    def connection_lost(self, _exc: Exception | None) -> None:
        self.is_spoilt = True
        self._settle(TunnelRefused("The egress proxy opened no tunnel."))

    def _settle(self, error: TunnelRefused | None) -> None:
        if self._opened.done():
            return
        if error is None:
            self._opened.set_result(None)
        else:
            self._opened.set_exception(error)
