"""The lean HTTP/1.1 client of the hot path: a pool of kept connections to one base URL."""

import asyncio
import logging
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from ibex.errors import ProviderTimeout, ProviderUnavailable
from ibex.providers.answer import Answer
from ibex.providers.connection import Connection, ConnectionStale, Deadlines
from ibex.providers.proxies import Proxy, Tunnel, TunnelRefused

log = logging.getLogger("ibex.providers")

Headers = Sequence[tuple[bytes, bytes]]

MAX_IDLE_CONNECTIONS: Final = 1024


class ConnectFailed(ProviderUnavailable):
    """The model provider could not be reached."""


class CertificateRefused(ProviderUnavailable):
    """The model provider's certificate could not be verified."""


class ConnectTimedOut(ProviderTimeout):
    """The model provider could not be reached in time."""


class Transport:
    """Sends requests to one scheme, host and port, whatever they say; follows no redirect.

    A connection carries one request at a time and is reused, the latest first, only when its last answer ended exactly
    where it should and nothing has been said since. With a proxy, an https upstream is reached through a tunnel, in
    which TLS is spoken with the upstream itself. Must be used in one event loop.
    """

    def __init__(
        self,
        base_url: str,
        *,
        deadlines: Deadlines | None = None,
        ssl_context: ssl.SSLContext | None = None,
        proxy: Proxy | None = None,
        max_idle: int = MAX_IDLE_CONNECTIONS,
    ) -> None:
        """Raises ValueError when the base URL is not `http(s)://host[:port][/path]`."""
        url = urlsplit(base_url)
        if (
            url.scheme not in {"http", "https"}
            or not url.hostname
            or url.username is not None
            or url.query
            or url.fragment
        ):
            raise ValueError("a provider's base URL is http(s)://host[:port][/path]")
        self._host = url.hostname
        self._port = url.port or (443 if url.scheme == "https" else 80)
        self._path = url.path.rstrip("/")
        self._authority = url.netloc.encode("idna" if not url.hostname.isascii() else "ascii")
        self._deadlines = deadlines or Deadlines()
        self._max_idle = max_idle
        self._ssl = (ssl_context or make_ssl_context()) if url.scheme == "https" else None
        self._proxy = proxy if url.scheme == "https" else None
        self._idle: list[Connection] = []
        self._connections: set[Connection] = set()
        self._is_closed = False

    def prepare(self, method: str, path: str, headers: Headers) -> bytes:
        """Encode what all requests of one kind share; `path` is appended to the base URL's own."""
        lines = [f"{method} {self._path}{path} HTTP/1.1\r\nHost: ".encode("ascii") + self._authority]
        lines += [_line(name, value) for name, value in headers]
        return b"\r\n".join(lines) + b"\r\n"

    async def send(self, prepared: bytes, body: bytes | None = None, headers: Headers = ()) -> Answer:
        """Send one request and wait for the head of its answer.

        Once, and without a word, the request is sent again over a new connection when a kept one closed before any
        byte. Raises ConnectFailed or ConnectTimedOut when there is no connection to be had, ProviderTimeout when the
        head does not come in time, ProviderUnavailable when it is cut or not HTTP. Cancellation closes the connection.
        """
        parts = [prepared]
        for name, value in headers:
            parts += _line(name, value), b"\r\n"
        if body is None:
            parts.append(b"\r\n")
        else:
            parts += b"Content-Length: %d\r\n\r\n" % len(body), body
        request = b"".join(parts)
        connection = self._check_out()
        if connection is not None:
            try:
                return await connection.exchange(request)
            except ConnectionStale:
                pass
        connection = await self._connect()
        return await connection.exchange(request)

    async def close(self) -> None:
        """Close every connection; calls under way end with ProviderUnavailable."""
        self._is_closed = True
        for connection in tuple(self._connections):
            connection.abort()
        self._idle.clear()
        await asyncio.sleep(0)

    @property
    def idle_connections(self) -> int:
        """How many connections wait for a request."""
        return len(self._idle)

    @property
    def open_connections(self) -> int:
        """How many connections there are."""
        return len(self._connections)

    def _check_out(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_worn and connection.is_quiet():
                return connection
            connection.abort()
        return None

    async def _connect(self) -> Connection:
        if self._is_closed:
            raise ConnectFailed
        try:
            async with asyncio.timeout(self._deadlines.connect):
                connection = await (self._connect_directly() if self._proxy is None else self._dig(self._proxy))
        except TimeoutError as error:
            raise ConnectTimedOut from error
        except ssl.SSLCertVerificationError as error:  # no retry mends it
            log.warning("certificate refused", extra={"host": self._host, "reason": error.verify_message})
            raise CertificateRefused from error
        except OSError as error:  # refused, unreachable, no such name, and every other fault of TLS
            raise ConnectFailed(_explain(error)) from error
        if not connection.is_closed:
            self._connections.add(connection)
        return connection

    async def _connect_directly(self) -> Connection:
        host = None if self._ssl is None else self._host
        _, connection = await asyncio.get_running_loop().create_connection(
            self._make_connection, self._host, self._port, ssl=self._ssl, server_hostname=host
        )
        return connection

    async def _dig(self, proxy: Proxy) -> Connection:
        """Connect through a tunnel of the proxy's."""
        loop = asyncio.get_running_loop()
        request = proxy.connect_request(self._host, self._port)
        outer, tunnel = await loop.create_connection(lambda: Tunnel(request), proxy.host, proxy.port)
        try:
            await tunnel.opened()
            assert self._ssl is not None  # noqa: S101 (only https goes through the proxy)
            inner = await loop.start_tls(outer, tunnel, self._ssl, server_hostname=self._host)
            if inner is None or tunnel.is_spoilt:
                raise ConnectionResetError
        except BaseException:  # failed or cancelled: no half-open tunnel may be left
            outer.abort()
            raise
        connection = self._make_connection()
        inner.set_protocol(connection)
        connection.connection_made(inner)
        return connection

    def _make_connection(self) -> Connection:
        return Connection(self._deadlines, self._keep, self._forget)

    def _keep(self, connection: Connection) -> None:
        if self._is_closed or connection.is_worn or len(self._idle) >= self._max_idle:
            connection.abort()
        else:
            self._idle.append(connection)

    def _forget(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)


def make_ssl_context(authorities: Path | None = None) -> ssl.SSLContext:
    """Verify as the system does, and besides trust the authorities of a PEM file; raises ValueError without such."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    if authorities is not None:
        try:
            context.load_verify_locations(authorities)
        except ssl.SSLError:
            raise ValueError(f"SSL_CERT_FILE: {authorities} holds no certificates in PEM") from None
        except OSError as error:
            raise ValueError(f"SSL_CERT_FILE: {authorities} cannot be read: {error.strerror}") from None
    return context


def _line(name: bytes, value: bytes) -> bytes:
    line = name + b": " + value
    if not line.isascii() or b"\r" in line or b"\n" in line or b"\0" in line:
        raise ValueError("a header field holds what no header field may")
    return line


def _explain(error: OSError) -> str:
    """What a client may know of why there is no connection: neither the address nor a library's words."""
    if isinstance(error, TunnelRefused):
        return str(error)
    if isinstance(error, ssl.SSLError):
        return "No TLS connection to the model provider could be made."
    if isinstance(error, ConnectionRefusedError):
        return "The model provider refused the connection."
    return ConnectFailed.default_message()
