"""A Postgres that is killed, again and again: whoever is known stays known, and no revocation is missed."""

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import asyncpg
import pytest

from ibex.engines.embedded import EmbeddedEngines
from ibex.engines.postgres import OWNER, SUPERUSER
from ibex.errors import InvalidToken, ServiceDegraded
from ibex.stores.postgres.schema import postgres_migrator
from tests.conftest import UNSAFE_AND_QUICK, PostgresDatabase, new_data_dir, run_apart, settings_of
from tests.pipeline.conftest import Door

DATABASE = "ibex"
LAZY = UNSAFE_AND_QUICK | {"wal_writer_delay": "10s"}
"""What need not be on the disk at once is not, so that a crash forgets it."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A PostgreSQL of its own, to be killed."""

    engines: EmbeddedEngines

    @property
    def database(self) -> PostgresDatabase:
        """The one database there is."""
        postgres = self.engines.postgres
        assert postgres is not None
        return PostgresDatabase(DATABASE, postgres.dsn, postgres.admin_dsn, postgres.dsn_of(SUPERUSER, DATABASE))

    async def kill(self) -> None:
        """Kill it, and wait until it is dead."""
        postgres = self.engines.postgres
        assert postgres is not None
        assert postgres.pid is not None
        os.kill(postgres.pid, signal.SIGKILL)
        await postgres.wait()

    async def start_again(self) -> None:
        """Start it on its data."""
        postgres = self.engines.postgres
        assert postgres is not None
        await postgres.start()

    async def lose(self, door: Door) -> None:
        """Kill it, and have the door know; a backend may outlive it by a moment and answer once more."""
        await self.kill()
        while not door.follower.postgres_is_away:
            await door.poll()
        door.grow_old()

    async def next_xid(self) -> int:
        """The transaction id that it will give next."""
        connection = await asyncpg.connect(self.database.dsn)
        try:
            return int(await connection.fetchval("select pg_snapshot_xmax(pg_current_snapshot())::text"))
        finally:
            await connection.close()

    async def spend_xids(self, count: int) -> None:
        """Begin so many transactions that leave nothing behind."""
        connection = await asyncpg.connect(self.database.admin_dsn)
        try:
            await connection.execute("begin; select pg_current_xact_id(); rollback;" * count)
        finally:
            await connection.close()

    async def forget_xids(self, door: Door) -> int:
        """Have the feed see transaction ids that a crash then forgets; how many. Leaves it dead."""
        await self.spend_xids(20)
        await door.poll()
        seen = await self.next_xid()
        await self.kill()
        await self.start_again()
        forgotten = seen - await self.next_xid()
        assert forgotten > 0, "the crash has forgotten nothing, so this would show nothing"
        return forgotten


async def migrate(dsn: str) -> None:
    async with postgres_migrator(dsn, holder="tests") as migrator:
        await migrator.up()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster with ibex's schema."""
    with new_data_dir() as data_dir:
        engines = EmbeddedEngines(settings_of(data_dir), stores={"postgres"}, postgres_options=LAZY)
        with engines.directory.lock():
            run_apart(engines.start())
            assert engines.postgres is not None
            run_apart(migrate(engines.postgres.dsn_of(OWNER, DATABASE)))
            yield Cluster(engines)
            run_apart(engines.stop())


@pytest.fixture
def postgres_database(cluster: Cluster) -> PostgresDatabase:
    """What the door stands before: this module's own cluster."""
    return cluster.database


async def test_a_known_caller_is_served_through_one_crash_after_another(door: Door, cluster: Cluster) -> None:
    await door.enter()
    await door.hear_redis()
    reads = door.reader.reads.count
    for _ in range(2):
        await cluster.forget_xids(door)
        await door.poll()
        await cluster.lose(door)

        assert (await door.enter()).was_cached
        await cluster.start_again()
        await door.poll()
    assert door.reader.reads.count == reads


async def test_a_revocation_by_a_transaction_id_that_was_given_before_is_not_missed(
    door: Door, cluster: Cluster
) -> None:
    await door.enter()
    forgotten = await cluster.forget_xids(door)
    await door.admin.revoke_token(door.tenant.token_id)
    await cluster.spend_xids(forgotten + 5)
    await door.poll()

    await door.refuse(InvalidToken)


async def test_a_revocation_between_two_crashes_is_in_force_once_it_is_heard(door: Door, cluster: Cluster) -> None:
    await door.enter()
    await door.hear_redis()
    await cluster.forget_xids(door)
    await door.admin.revoke_token(door.tenant.token_id)
    await door.publish("token", door.tenant.token_id)
    await cluster.lose(door)

    await door.refuse(ServiceDegraded)
    await cluster.start_again()
    await door.poll()
    await door.refuse(InvalidToken)
