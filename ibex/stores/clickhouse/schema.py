"""ClickHouse as a target of migrations: it has no transactions, so its migrations can be run again from anywhere."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

from clickhouse_connect.driver.exceptions import Error

from ibex.stores.clickhouse.client import NO_SCHEMA, ClickHouse, ClickHouseAddress, translated
from ibex.stores.migrations import AppliedMigration, Migration

_STATEMENT_END = re.compile(r";[ \t]*(?:\n|\Z)")
_NOTES = """create table if not exists schema_migrations
(number UInt32, name String, checksum String, applied_at DateTime64(3, 'UTC') default now64(3))
engine = ReplacingMergeTree(applied_at) order by number"""


class ClickHouseSchema:
    """The database a ClickHouse DSN names, made when it is missing. Close it after use."""

    name = "clickhouse"

    def __init__(self, dsn: str) -> None:
        address = ClickHouseAddress.parse(dsn)
        self._database = address.database
        self._server = ClickHouse(address, in_database=False)
        self._clickhouse = ClickHouse(address)

    async def close(self) -> None:
        """Close the connections."""
        await self._server.close()
        await self._clickhouse.close()

    async def command(self, sql: str) -> None:
        """Run one statement in the database."""
        with translated():
            await (await self._clickhouse.client()).command(sql)

    @asynccontextmanager
    async def exclusively(self) -> AsyncIterator[None]:
        """Make the database and its `schema_migrations`. ClickHouse has no lock to hold: each statement of a migration
        must say `if (not) exists`, and two runs at once end as one.
        """
        with translated():
            await (await self._server.client()).command(f"create database if not exists {_quote(self._database)}")
        await self.command(_NOTES)
        yield

    async def applied(self) -> list[AppliedMigration]:
        """What has been applied, lowest number first; empty when nothing ever was."""
        sql = "select number, name, checksum, applied_at from schema_migrations final order by number"
        with translated():
            client = await self._server.client()
            try:
                rows = (await client.query(sql, settings={"database": self._database})).result_rows
            except Error as error:
                if error.code in NO_SCHEMA:
                    return []
                raise
        return [AppliedMigration(*row) for row in rows]

    async def apply(self, migration: Migration) -> None:
        """Run `up_sql`, then note it."""
        await self._run(migration.up_sql)
        with translated():
            await (await self._clickhouse.client()).insert(
                "schema_migrations",
                [[migration.number, migration.name, migration.checksum, datetime.now(UTC)]],
                column_names=["number", "name", "checksum", "applied_at"],
            )

    async def revert(self, migration: Migration) -> None:
        """Run `down_sql`, then strike out the note."""
        await self._run(migration.down_sql)
        await self.command(
            f"alter table schema_migrations delete where number = {migration.number:d} settings mutations_sync = 1"
        )

    async def _run(self, sql: str) -> None:
        for statement in _STATEMENT_END.split(sql):
            if statement.strip():
                await self.command(statement)


def _quote(identifier: str) -> str:
    return "`" + identifier.replace("\\", "\\\\").replace("`", "\\`") + "`"
