"""An upstream that says whatever a script says, and a transport to ask it with."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from ibex.providers.connection import Deadlines
from ibex.providers.transport import Transport

Script = Callable[["Talk"], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\nhi"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
LONG = Deadlines(connect=20, first_byte=20, idle=20, total=20, keep=20)


@dataclass
class Talk:
    """The upstream's end of one connection."""

    number: int
    """Connections are counted from 1."""
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    requests: list[bytes] = field(default_factory=list)
    """All requests of all connections, heads and bodies."""

    async def hear(self) -> bytes:
        """The next request, head and body; ConnectionError or IncompleteReadError when there is none."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = next((int(line[16:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length: ")), 0)
        request = head + await self.reader.readexactly(length)
        self.requests.append(request)
        return request

    async def say(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()

    async def wait_for_end(self) -> None:
        """Until the client has closed."""
        try:
            while await self.reader.read(1 << 16):
                pass
        except ConnectionError:
            return


@dataclass
class Upstream:
    """A server that follows a script on each connection."""

    base_url: str
    requests: list[bytes] = field(default_factory=list)
    connections: int = 0
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """Set whenever a client has closed a connection that the script was waiting on."""


@asynccontextmanager
async def serve_script(
    script: Script, *, ssl_context: ssl.SSLContext | None = None, host: str = "127.0.0.1", port: int = 0
) -> AsyncIterator[Upstream]:
    """Serve a script on each connection; whatever is still open at the end is cut."""
    talks: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        talks.add(task)
        upstream.connections += 1
        try:
            await script(Talk(upstream.connections, reader, writer, upstream.requests))
        except (ConnectionError, asyncio.IncompleteReadError):
            upstream.ended.set()
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            talks.discard(task)
            writer.close()

    server = await asyncio.start_server(accept, host, port, ssl=ssl_context)
    port = server.sockets[0].getsockname()[1]
    authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    upstream = Upstream(f"{'http' if ssl_context is None else 'https'}://{authority}/v1")
    try:
        yield upstream
    finally:
        server.close()
        for task in tuple(talks):
            task.cancel()
        await asyncio.gather(*talks, return_exceptions=True)
        await server.wait_closed()


@asynccontextmanager
async def open_transport(base_url: str, **options: Any) -> AsyncIterator[Transport]:
    transport = Transport(base_url, **{"deadlines": LONG, **options})
    try:
        yield transport
    finally:
        await transport.close()


def post(transport: Transport) -> bytes:
    return transport.prepare("POST", "/chat/completions", [(b"Accept", b"application/json")])


async def ask(transport: Transport, body: bytes = b"{}") -> bytes:
    answer = await transport.send(post(transport), body)
    return await answer.read(1 << 20)


async def answer_all(talk: Any) -> None:
    while True:
        await talk.hear()
        await talk.say(OK)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 (what is waited for has no event)
            await asyncio.sleep(0.002)
