"""The way back to a client: heads, bodies and their ends, written byte by byte on purpose.

What ibex promises about the end of a reply is about bytes on the wire: the terminating chunk leaves when the turn is
kept, and never after a broken stream. So the reply is written here rather than by a response object that ends itself.
"""

import asyncio
from collections.abc import Mapping
from email.utils import formatdate
from http import HTTPStatus
from time import perf_counter, time
from uuid import UUID

from aiohttp.web_protocol import RequestHandler

from ibex.errors import RequestError
from ibex.server.edge.envelope import encode_error_item
from ibex.telemetry import Metrics, StageClock

_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in HTTPStatus}


class WireReply:
    """One reply on one connection: what the pipeline writes to."""

    def __init__(
        self,
        protocol: RequestHandler,
        clock: StageClock,
        metrics: Metrics,
        request_id: UUID,
        *,
        trace_id: str | None = None,
        is_http10: bool = False,
        keeps_alive: bool = True,
        is_head_only: bool = False,
        slow_client_seconds: float = 60.0,
    ) -> None:
        self.keep_alive = keeps_alive
        """Whether the connection may take another request."""
        self.status = 0
        """The status that was begun; 0 before."""
        self.error_code: str | None = None
        """The error it ended with: the whole of it, or what cut it off."""
        self.has_left = False
        self.is_stream = False
        self.interruption: RequestError | None = None
        """Why the server is cutting it off, if it is."""
        self._protocol = protocol
        self._clock = clock
        self._metrics = metrics
        self.request_id = str(request_id)
        """As the response's header says it."""
        self._request_uuid = request_id
        self._trace_id = trace_id
        self._is_http10 = is_http10
        self._is_head_only = is_head_only
        self._slow_client_seconds = slow_client_seconds
        self._is_chunked = False
        self._head = b""

    def begin(self, status: int, headers: Mapping[str, str], *, length: int | None) -> None:
        """Note the head; it leaves with the first byte after it."""
        self.status = status
        self.is_stream = length is None
        self._is_chunked = length is None and not self._is_http10
        if length is None and self._is_http10:
            self.keep_alive = False
        lines = [_STATUS_LINES.get(status) or f"HTTP/1.1 {status} \r\n", _date_line()]
        lines += [f"{name}: {value}\r\n" for name, value in headers.items()]
        lines.append(f"X-Request-ID: {self.request_id}\r\nX-Response-Time: {self._clock.elapsed() * 1e3:.3f}\r\n")
        if self._trace_id is not None:
            lines.append(f"X-Trace-ID: {self._trace_id}\r\n")
        if length is not None:
            lines.append(f"Content-Length: {length}\r\n")
        elif self._is_chunked:
            lines.append("Transfer-Encoding: chunked\r\n")
        if not self.keep_alive:
            lines.append("Connection: close\r\n")
        elif self._is_http10:
            lines.append("Connection: keep-alive\r\n")
        lines.append("\r\n")
        self._head = "".join(lines).encode("latin-1")

    async def write(self, data: bytes) -> None:
        """Send some of the body; waits while the client is slow."""
        self._send(self._frame(data))
        if self._protocol.writing_paused:
            self._metrics.stream_backpressure_events_total.inc()
            await self._drain()

    async def finish(self, last: bytes) -> None:
        """Send the last bytes and the end of the body."""
        self._send(self._frame(last) + (b"0\r\n\r\n" if self._is_chunked else b""))
        if self._protocol.writing_paused:
            await self._drain()

    async def cut(self, error: RequestError) -> None:
        """Close the connection without the end of the body; a stream says why in a last item."""
        self.keep_alive = False
        self.error_code = error.code
        transport = self._protocol.transport
        if transport is None:
            return
        if self.is_stream:
            self._send(self._frame(encode_error_item(error, self._request_uuid)))
            transport.close()
        else:
            transport.abort()

    def _frame(self, data: bytes) -> bytes:
        if not data or self._is_head_only:
            return b""
        return b"%x\r\n%b\r\n" % (len(data), data) if self._is_chunked else data

    def _send(self, data: bytes) -> None:
        transport = self._protocol.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client has left")
        if not self.has_left:
            self.has_left = True
            self._clock.first_byte_out = perf_counter()
            data = self._head + data
        if data:
            transport.write(data)

    async def _drain(self) -> None:
        """Wait for a slow client; one that takes nothing has left."""
        try:
            async with asyncio.timeout(self._slow_client_seconds):
                await self._protocol._drain_helper()  # aiohttp's own StreamWriter.drain does the same
        except TimeoutError:
            if self._protocol.transport is not None:
                self._protocol.transport.abort()
            raise ConnectionResetError("the client takes nothing") from None


_date: tuple[int, str] = (0, "")


def _date_line() -> str:
    """The Date field, made once a second."""
    global _date  # a cache of the clock, nothing more
    second = int(time())
    if _date[0] != second:
        _date = (second, f"Date: {formatdate(second, usegmt=True)}\r\n")
    return _date[1]
