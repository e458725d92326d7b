"""Stores that belong to the test and not to a server: to be stopped for as long as it likes, under one node or two."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ibex.domain.identity import DEV_ORG_ID
from ibex.engines.embedded import EmbeddedEngines
from ibex.engines.engine import Engine
from tests.acceptance.conftest import PYTHON, make_data_dir, remove_data_dir
from tests.chaos.houses import ChaosHouse
from tests.conftest import quick_engines, settings_of


@dataclass
class OwnStores:
    """Postgres, Redis and ClickHouse as servers elsewhere, for nodes that are given their addresses."""

    engines: EmbeddedEngines
    nodes: list[ChaosHouse] = field(default_factory=list)

    def engine(self, name: str) -> Engine:
        """The engine of this name: postgres, valkey or clickhouse."""
        (found,) = [engine for engine in self.engines.engines if engine.name == name]
        return found

    @asynccontextmanager
    async def away(self, name: str) -> AsyncIterator[None]:
        """One of them is stopped, and started again at the same address."""
        await self.engine(name).stop()
        try:
            yield
        finally:
            await self.engine(name).start()

    async def open_node(self, data_dir: Path | None = None, **settings: str) -> ChaosHouse:
        """Start a node on them; the first one migrates, and lifts the limits."""
        addresses = self.engines.addresses
        settings = {
            "IBEX_POSTGRES_DSN": addresses.postgres,
            "IBEX_POSTGRES_ADMIN_DSN": addresses.postgres_admin,
            "IBEX_REDIS_URL": addresses.redis,
            "IBEX_CLICKHOUSE_DSN": addresses.clickhouse,
            **settings,
        }
        data_dir = data_dir or make_data_dir()
        is_first = not self.nodes
        if is_first:
            await _migrate(data_dir, settings)
        node = await asyncio.to_thread(ChaosHouse.open, data_dir, **settings)
        self.nodes.append(node)
        if is_first:
            await asyncio.to_thread(node.ctl, "org", "limit", str(DEV_ORG_ID), "--rpm", "1000000")
        return node

    async def close(self) -> None:
        """End what is left of the nodes, and the stores."""
        for node in self.nodes:
            if node.process.poll() is None:
                await asyncio.to_thread(node.end)
            remove_data_dir(node.data_dir)
        await self.engines.stop()


async def _migrate(data_dir: Path, settings: dict[str, str]) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("IBEX_")}
    environ |= {"IBEX_ENV_FILE": os.devnull, "IBEX_DATA_DIR": str(data_dir), **settings}
    command = (PYTHON, "-m", "ibexctl", "migrate", "up", "--seed", "--json")
    process = await asyncio.create_subprocess_exec(*command, env=environ, stdout=asyncio.subprocess.DEVNULL)
    assert await process.wait() == 0


@asynccontextmanager
async def open_stores() -> AsyncIterator[OwnStores]:
    """All three, running."""
    data_dir = make_data_dir()
    engines = quick_engines(settings_of(data_dir))
    try:
        with engines.directory.lock():
            await engines.start()
            stores = OwnStores(engines)
            try:
                yield stores
            finally:
                await stores.close()
    finally:
        remove_data_dir(data_dir)
