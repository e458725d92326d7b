"""A relay between the house and its upstream that changes nothing and notes when the upstream's bytes came by."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit


class Wiretap:
    """What came from the upstream since `clear()`: when (`time.perf_counter`) and what."""

    def __init__(self, upstream: str) -> None:
        self._upstream = urlsplit(upstream)
        self.base_url = ""
        """The upstream's base URL, by way of this relay."""
        self.seen: list[tuple[float, bytes]] = []
        self._writers: set[asyncio.StreamWriter] = set()

    def clear(self) -> None:
        """Forget what came by."""
        self.seen.clear()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of the house's, until either side ends it."""
        with suppress(OSError):
            far_reader, far_writer = await asyncio.open_connection(self._upstream.hostname, self._upstream.port)
            self._writers |= {writer, far_writer}
            await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer, is_noted=True))
            self._writers -= {writer, far_writer}

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_noted: bool = False
    ) -> None:
        try:
            while data := await reader.read(1 << 16):
                if is_noted:
                    self.seen.append((time.perf_counter(), data))
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()

    def close(self) -> None:
        """Cut every connection."""
        for writer in tuple(self._writers):
            writer.transport.abort()


@asynccontextmanager
async def tapped(upstream: str) -> AsyncIterator[Wiretap]:
    """A wiretap before an upstream (its base URL), listening on loopback."""
    tap = Wiretap(upstream)
    server = await asyncio.start_server(tap.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    tap.base_url = f"http://127.0.0.1:{port}{urlsplit(upstream).path}"
    try:
        yield tap
    finally:
        server.close()
        tap.close()
        await server.wait_closed()


def event_times(pieces: list[tuple[float, bytes]]) -> list[float]:
    """When each event of a stream began to arrive."""
    return [moment for moment, piece in pieces for _ in range(piece.count(b"data: {"))]
