"""One client's connection to the sandbox: HTTP/1.1 as a server speaks it, quick enough for benchmarks."""

import asyncio
import secrets
import socket
import struct
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final, cast

import httptools

from ibex.sandbox.record import Entry
from ibex.sandbox.requests import RawEnd
from ibex.telemetry import spawn

JSON: Final = "application/json"

_REASONS: Final = {status.value: status.phrase for status in HTTPStatus}


@dataclass(slots=True)
class Request:
    """One request."""

    method: str
    target: str
    fields: list[tuple[bytes, bytes]]
    body: bytes

    def field(self, name: bytes) -> bytes | None:
        """The first field of this name, which is given in lower case."""
        return next((value for found, value in self.fields if found.lower() == name), None)


class Peer(asyncio.Protocol):
    """Reads requests, one at a time, and hands each to `answer`, which replies through `send` or `begin … finish`."""

    __slots__ = (
        "_answer",
        "_body",
        "_can_write",
        "_fields",
        "_is_busy",
        "_is_chunked",
        "_is_kept",
        "_parser",
        "_peers",
        "_target",
        "_task",
        "_transport",
        "entry",
    )

    def __init__(self, answer: Callable[["Peer", Request], None], peers: set["Peer"]) -> None:
        self.entry: Entry | None = None
        """The record of the request that is being answered."""
        self._answer = answer
        self._peers = peers
        self._parser = httptools.HttpRequestParser(self)
        self._target = b""
        self._fields: list[tuple[bytes, bytes]] = []
        self._body: list[bytes] = []
        self._is_chunked = False
        self._is_busy = False
        self._is_kept = True
        self._task: asyncio.Task[None] | None = None
        self._can_write: asyncio.Future[None] | None = None

    # Answering.

    def send(
        self, status: int, body: bytes, headers: Mapping[str, str] | None = None, content_type: str = JSON
    ) -> None:
        """Send a whole answer."""
        self._transport.write(self._head(status, content_type, headers, len(body)) + body)
        self._end("complete")

    async def write_raw(self, data: bytes) -> None:
        """Send bytes that need not be part of an answer at all; waits for a slow client."""
        self._transport.write(data)
        await self._keep_pace()

    def end_raw(self, how: RawEnd) -> None:
        """End what was sent so. After `hang` and `half_close` it is the client's to close."""
        match how:
            case "close" | "keep":
                self._end("complete")
                if how == "close":
                    self._transport.close()
            case "reset":
                sock = self._transport.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.abort()
            case "half_close":
                self._transport.write_eof()
            case "hang":
                pass

    def begin(self, status: int, content_type: str, headers: Mapping[str, str], *, length: int | None = None) -> None:
        """Send the head of an answer whose body comes in pieces: chunked, unless its length is given."""
        self._is_chunked = length is None
        self._transport.write(self._head(status, content_type, headers, length))

    async def write(self, *pieces: bytes) -> None:
        """Send pieces of the body, each a chunk of its own; waits for a slow client."""
        if self._is_chunked:
            self._transport.writelines([b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces if piece])
        else:
            self._transport.writelines(pieces)
        await self._keep_pace()

    def finish(self) -> None:
        """End the body."""
        if self._is_chunked:
            self._transport.write(b"0\r\n\r\n")
        self._end("complete")

    def cut(self) -> None:
        """Close in the middle of the answer, after what has been written."""
        self._end("cut")
        self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        self._end("cut")
        self._transport.abort()

    def perform(self, answering: Coroutine[Any, Any, None]) -> None:
        """Answer in the background; ends at once when the client is gone."""
        self._task = spawn(answering, name="sandbox answer")

    async def _keep_pace(self) -> None:
        if self._can_write is not None:
            await self._can_write
        elif self._transport.is_closing():
            await asyncio.sleep(0)  # until the loop has told of the end, which ends this answer

    def _end(self, how: str) -> None:
        entry, self.entry = self.entry, None
        if entry is not None:
            entry.end(how)
        self._is_busy = False
        if not self._is_kept and how == "complete":
            self._transport.close()

    def _head(self, status: int, content_type: str, headers: Mapping[str, str] | None, length: int | None) -> bytes:
        size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
        lines = [f"HTTP/1.1 {status} {_REASONS.get(status, 'Unknown')}", f"Content-Type: {content_type}", size]
        lines.append(f"x-request-id: req_{secrets.token_hex(16)}\r\nopenai-processing-ms: 1\r\nx-ibex-sandbox: true")
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        return "\r\n".join([*lines, "\r\n"]).encode("latin-1")

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._peers.add(self)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 (asyncio's signature)
        self._peers.discard(self)
        self._end("client_disconnect")
        if self._task is not None:
            self._task.cancel()

    def pause_writing(self) -> None:
        self._can_write = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        if self._can_write is not None:
            if not self._can_write.done():
                self._can_write.set_result(None)
            self._can_write = None

    # What httptools calls.

    def on_message_begin(self) -> None:
        self._target = b""
        self._fields = []
        self._body = []

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields.append((name, value))
        if name.lower() == b"expect":
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        if self._is_busy:  # pipelined, which nobody does
            self.abort()
            return
        self._is_busy, self._is_kept = True, self._parser.should_keep_alive()
        method = self._parser.get_method().decode("ascii")
        self._answer(self, Request(method, self._target.decode("latin-1"), self._fields, b"".join(self._body)))
