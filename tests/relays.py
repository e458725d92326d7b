"""A relay between a client and a store's socket, to cut, hold and refuse connections as networks do."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import parse_qs, urlsplit


class Relay:
    """Passes bytes on between `dsn` (here) and the store behind it."""

    def __init__(self, dsn: str) -> None:
        self._behind = dsn
        self._server: asyncio.Server | None = None
        self._port = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()

    @property
    def dsn(self) -> str:
        """The store's DSN, by way of this relay."""
        where = urlsplit(self._behind)
        credentials = where.netloc.rpartition("@")[0]
        if where.scheme == "unix":
            database = parse_qs(where.query).get("db", ["0"])[0]
            return f"redis://{credentials}@127.0.0.1:{self._port}/{database}"
        return where._replace(netloc=f"{credentials}@127.0.0.1:{self._port}", query="").geturl()

    async def start(self) -> None:
        """Listen, on the same port as before."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Refuse connections and cut those there are."""
        if self._server is not None:
            self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Reset every connection, whatever is under way."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    def hold(self) -> None:
        """Pass nothing on, and say nothing: connections are accepted and stay silent."""
        self._flowing.clear()

    def release(self) -> None:
        """Let it flow again."""
        self._flowing.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            far_reader, far_writer = await self._connect()
            self._writers.add(far_writer)
            await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
        writer.close()  # nobody may be there behind it
        self._tasks.discard(task)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        where = urlsplit(self._behind)
        if where.scheme == "unix":
            return await asyncio.open_unix_connection(where.path)
        directory = parse_qs(where.query).get("host", [""])[0]
        if directory.startswith("/"):
            port = parse_qs(where.query).get("port", [str(where.port or 5432)])[0]
            return await asyncio.open_unix_connection(f"{directory}/.s.PGSQL.{port}")
        return await asyncio.open_connection(where.hostname, where.port)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            await self._flowing.wait()
            writer.write(data)
            await writer.drain()
        writer.close()


@asynccontextmanager
async def relayed(dsn: str) -> AsyncIterator[Relay]:
    """A relay to a store, listening."""
    relay = Relay(dsn)
    await relay.start()
    try:
        yield relay
    finally:
        await relay.stop()
