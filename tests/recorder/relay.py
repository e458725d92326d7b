"""A relay between a client and a store that can be shut, and that can lose a store's answers."""

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Self
from urllib.parse import parse_qs, urlsplit

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Relay:
    """Listens on a unix socket (Postgres) or a port (ClickHouse), and passes bytes on to where the DSN points."""

    def __init__(self, dsn: str, directory: Path) -> None:
        self._where = urlsplit(dsn)
        self._directory = directory
        self._server: asyncio.Server | None = None
        self._pairs: set[asyncio.StreamWriter] = set()
        self._port = 0
        self.answers_to_lose = 0
        self.answers_lost = 0

    @property
    def dsn(self) -> str:
        """The DSN to give to the client."""
        if self._where.scheme == "postgresql":
            return self._where._replace(query=f"host={self._directory}").geturl()
        credentials, _, _ = self._where.netloc.rpartition("@")
        return self._where._replace(netloc=f"{credentials}@127.0.0.1:{self._port}").geturl()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.shut()

    async def open(self) -> None:
        """Let clients through, at the same address as before."""
        if self._where.scheme == "postgresql":
            self._server = await asyncio.start_unix_server(self._relay, str(self._directory / ".s.PGSQL.5432"))
        else:
            self._server = await asyncio.start_server(self._relay, "127.0.0.1", self._port)
            self._port = self._server.sockets[0].getsockname()[1]

    async def shut(self) -> None:
        """Refuse connections and cut those there are."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
        for writer in self._pairs:
            writer.transport.abort()
        self._pairs.clear()
        await asyncio.sleep(0)

    async def _connect(self) -> Streams:
        if self._where.scheme == "postgresql":
            (sockets,) = parse_qs(self._where.query)["host"]
            return await asyncio.open_unix_connection(f"{sockets}/.s.PGSQL.5432")
        return await asyncio.open_connection(self._where.hostname, self._where.port)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await self._connect()
        self._pairs |= {writer, far_writer}
        with suppress(OSError, asyncio.CancelledError):
            await asyncio.gather(
                self._pump(reader, far_writer), self._pump(far_reader, writer, is_answer=True), return_exceptions=True
            )
        for end in (writer, far_writer):
            end.transport.abort()
            self._pairs.discard(end)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_answer: bool = False
    ) -> None:
        while data := await reader.read(1 << 16):
            if is_answer and self.answers_to_lose:
                self.answers_to_lose -= 1
                self.answers_lost += 1
                break
            writer.write(data)
            await writer.drain()
        writer.transport.abort() if is_answer else writer.write_eof()
