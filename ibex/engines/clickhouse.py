"""The embedded ClickHouse: chDB in a process of its own, for development and trials, spoken to as to any ClickHouse."""

import asyncio
import importlib.metadata
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from typing_extensions import override

from ibex.engines.datadir import DataDirectory
from ibex.engines.engine import Child, Engine

HOST, USER, DATABASE = "127.0.0.1", "ibex", "ibex"


class ClickHouseEngine(Engine):
    """ClickHouse 26 from a wheel, on a free port of the loopback interface."""

    name: ClassVar[str] = "clickhouse"
    label: ClassVar[str] = "ClickHouse (chDB, for development and trials)"

    def __init__(self, directory: DataDirectory, environ: Mapping[str, str]) -> None:
        super().__init__(directory, environ)
        self._reservation: socket.socket | None = None

    @property
    @override
    def location(self) -> Path:
        return self.directory.path / "clickhouse"

    @property
    @override
    def version(self) -> str:
        return ".".join(importlib.metadata.version("chdb-core").split(".")[:2])

    @property
    def port(self) -> int:
        """Its port, chosen at first use.

        We stay bound to it without listening, so that it is ours between two starts too, and no other user's process
        can take it and be sent the password.
        """
        if self._reservation is None:
            self._reservation = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            self._reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            self._reservation.bind((HOST, 0))
        port: int = self._reservation.getsockname()[1]
        return port

    @property
    def dsn(self) -> str:
        """Its address, with the password."""
        return f"http://{USER}:{self.directory.password('clickhouse')}@{HOST}:{self.port}/{DATABASE}"

    def release(self) -> None:
        """Give the port up, when it is not to be started again."""
        if self._reservation is not None:
            self._reservation.close()
            self._reservation = None

    @override
    async def _prepare(self) -> None:
        self.location.mkdir(mode=0o700, exist_ok=True)

    @override
    def _spawn(self) -> Child:
        server = [sys.executable, "-m", "ibex.engines.clickhouse_server"]
        return Child.spawn(
            [*server, "--directory", str(self.location), "--host", HOST, "--port", str(self.port), "--user", USER],
            log=self.log,
            environ={**self._environ, "TZ": "UTC"},
            death_signal=signal.SIGTERM,
            cwd=self.location,
            stdin=self.directory.password("clickhouse").encode(),
        )

    @override
    async def _is_ready(self) -> bool:
        reader, writer = await asyncio.open_connection(HOST, self.port)
        try:
            writer.write(b"GET /ping HTTP/1.0\r\n\r\n")
            return b" 200 " in await reader.readline()
        finally:
            writer.close()
            await writer.wait_closed()
