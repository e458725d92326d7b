"""A journal, its recorder, and the two stores it delivers to, real and empty."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID

import asyncpg
import pytest

from ibex.config import Settings
from ibex.domain.identity import OrgId
from ibex.domain.turns import Turn
from ibex.recorder import Recorder
from ibex.stores.clickhouse.schema import ClickHouseSchema
from ibex.stores.clickhouse.traces import TraceStore
from ibex.stores.journal.nudges import nudge_path
from ibex.stores.journal.writer import Journal
from ibex.stores.migrations import Migrator, find_migrations
from ibex.stores.postgres.changes import prune_changes
from ibex.stores.postgres.pool import Postgres
from ibex.stores.postgres.schema import seed_development
from ibex.stores.postgres.sessions import SessionStore
from ibex.telemetry import Metrics
from tests.turns import ORG


class Database(Protocol):
    """What the fixture `postgres_database` gives."""

    dsn: str
    admin_dsn: str


@dataclass
class House:
    """One node's journal and stores."""

    journal_dir: Path
    settings: Settings
    postgres: Database
    clickhouse_dsn: str
    metrics: Metrics = field(default_factory=Metrics)

    @asynccontextmanager
    async def journal(self, **options: Any) -> AsyncIterator[Journal]:
        """A writer, as a worker has one."""
        options = {"writer": "worker-0", "min_free_bytes": 0, "nudge": nudge_path(self.journal_dir), **options}
        journal = Journal(self.journal_dir, **options)
        journal.open()
        try:
            yield journal
        finally:
            await journal.close()

    async def write(self, turns: list[Turn], **options: Any) -> None:
        """Put turns into the journal, and let go of it."""
        async with self.journal(**options) as journal:
            await asyncio.gather(*(journal.record(turn) for turn in turns))

    @asynccontextmanager
    async def recorder(self, *, postgres: str | None = None, clickhouse: str | None = None) -> AsyncIterator[None]:
        """A recorder at work; it ends in order."""
        pool = await Postgres.connect(postgres or self.postgres.dsn, name="recorder")
        traces = await TraceStore.connect(clickhouse or self.clickhouse_dsn)
        recorder = Recorder(
            self.settings,
            journal_dir=self.journal_dir,
            sessions=SessionStore(pool),
            traces=traces,
            metrics=self.metrics,
            prune=partial(prune_changes, pool),
        )
        stop = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(recorder.run(stop))
                yield
                stop.set()
        finally:
            await traces.close()
            await pool.close()

    async def deliver(self) -> None:
        """Run a recorder for as long as it has something to do."""
        async with self.recorder():
            pass

    async def checkpoints(self) -> list[UUID]:
        """Turn ids in Postgres."""
        connection = await asyncpg.connect(self.postgres.admin_dsn)
        try:
            rows = await connection.fetch("select turn_id from ibex_core.checkpoints order by turn_index")
        finally:
            await connection.close()
        return [row["turn_id"] for row in rows]

    async def traces(self) -> list[dict[str, Any]]:
        """Rows in ClickHouse."""
        store = await TraceStore.connect(self.clickhouse_dsn)
        try:
            return await store.list(org_ids=[OrgId(ORG)], limit=None, is_oldest_first=True)
        finally:
            await store.close()

    async def trace_ids(self) -> list[UUID]:
        """Turn ids in ClickHouse."""
        return [row["turn_id"] for row in await self.traces()]

    def files(self, pattern: str) -> list[Path]:
        """Files of the journal."""
        return sorted(self.journal_dir.glob(pattern))

    async def wait_for(self, read: Callable[[], Any], expected: list[UUID]) -> None:
        """Until a store has these turns, each once."""
        async with asyncio.timeout(30):
            while sorted(await read()) != sorted(expected):  # noqa: ASYNC110 - there is nothing that could be awaited
                await asyncio.sleep(0.02)


@pytest.fixture
async def house(data_dir: Path, embedded_settings: Settings, postgres_database: Database, clickhouse_dsn: str) -> House:
    await seed_development(postgres_database.admin_dsn)
    schema = ClickHouseSchema(clickhouse_dsn)
    await Migrator(schema, find_migrations("clickhouse")).up()
    await schema.close()
    return House(data_dir / "journal", embedded_settings, postgres_database, clickhouse_dsn)
