"""The schema after each migration is the one that was agreed on: see the texts in tests/stores/schemas/.

`make schemas` writes them anew. A text of a migration that has been released must not change.
"""

import os

from ibex.stores.clickhouse.schema import ClickHouseSchema
from ibex.stores.migrations import Migrator, find_migrations
from ibex.stores.postgres.schema import postgres_migrator
from tests.conftest import PostgresDatabase
from tests.stores.schema_texts import SCHEMAS, describe_clickhouse, describe_postgres, path_of

IS_RENEWING = bool(os.environ.get("IBEX_TEST_RENEW_SCHEMAS"))


async def test_postgres_has_after_each_migration_the_schema_agreed_on(postgres_database: PostgresDatabase) -> None:
    dsn = postgres_database.admin_dsn
    async with postgres_migrator(dsn) as migrator:
        for migration in reversed(find_migrations("postgres")):
            text, path = await describe_postgres(dsn), path_of("postgres", migration)
            if IS_RENEWING:
                path.write_text(text)
            assert text == path.read_text(), f"{path.name}: `make schemas` shows the difference to git"
            await migrator.down()
    nothing = await describe_postgres(dsn)
    assert [line for line in nothing.splitlines() if not line.startswith(" ")] == [
        "schema ibex_core", "", "table schema_migrations",
    ]  # fmt: skip


async def test_clickhouse_has_after_each_migration_the_schema_agreed_on(clickhouse_dsn: str) -> None:
    schema = ClickHouseSchema(clickhouse_dsn)
    migrator = Migrator(schema, find_migrations("clickhouse"))
    await migrator.up()
    for migration in reversed(find_migrations("clickhouse")):
        text, path = describe_clickhouse(clickhouse_dsn), path_of("clickhouse", migration)
        if IS_RENEWING:
            path.write_text(text)
        assert text == path.read_text(), f"{path.name}: `make schemas` shows the difference to git"
        await migrator.down()
    await schema.close()


def test_no_text_is_left_of_a_migration_that_is_gone() -> None:
    known = {path_of(kind, migration) for kind in ("postgres", "clickhouse") for migration in find_migrations(kind)}
    assert set(SCHEMAS.rglob("*.txt")) == known
