"""An egress proxy for tests: it takes CONNECT, notes what it was asked, and leads wherever it is told to."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

OPENED = b"HTTP/1.1 200 Connection established\r\nVia: 1.1 proxy\r\n\r\n"


@dataclass
class EgressProxy:
    """What it listens on, and the heads it was sent."""

    port: int = 0
    asked: list[bytes] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@asynccontextmanager
async def egress_proxy(target: str, *, answer: bytes = OPENED) -> AsyncIterator[EgressProxy]:
    """A proxy whose every tunnel leads to the host and port of `target`; one that answers otherwise digs none."""
    proxy = EgressProxy()
    where = urlsplit(target)
    tasks: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        writers = [writer]
        try:
            proxy.asked.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(answer)
            if answer.startswith(OPENED):
                far_reader, far_writer = await asyncio.open_connection(where.hostname, where.port)
                writers.append(far_writer)
                await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))
            else:
                await reader.read()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        for each in writers:
            each.transport.abort()
            with contextlib.suppress(ConnectionError):
                await each.wait_closed()
        tasks.discard(task)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.transport.abort()
