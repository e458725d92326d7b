"""Migrations: up, down and up again, one migrator at a time, and never over a file that was changed."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from ibex.errors import ConfigurationError, OperatorError, SchemaMismatch
from ibex.stores.migrations import Migration, Migrator, find_migrations, read_migrations
from ibex.stores.postgres.schema import PostgresTarget, check_schema, postgres_migrator
from tests.conftest import PostgresDatabase

KNOWN = find_migrations("postgres")
ONE_MORE = Migration(len(KNOWN) + 1, "more", "create table ibex_core.more (id uuid)", "drop table ibex_core.more")
TWO_MORE = Migration(len(KNOWN) + 2, "much", "create table ibex_core.much (id uuid)", "drop table ibex_core.much")


@pytest.fixture
async def target(postgres_database: PostgresDatabase) -> AsyncIterator[PostgresTarget]:
    """The migrated database, on a connection of the owner's."""
    connection = await asyncpg.connect(postgres_database.admin_dsn)
    yield PostgresTarget(connection, lock_timeout=10)
    await connection.close()


async def describe(dsn: str) -> list[str]:
    """Every object of the schema, as text that is the same when the schema is."""
    connection = await asyncpg.connect(dsn)
    try:
        rows = await connection.fetch(
            """
            select format('%s.%s %s %s %s', table_name, column_name, data_type, is_nullable, column_default)
            from information_schema.columns where table_schema = 'ibex_core'
            union all select format('%s %s', conrelid::regclass, pg_get_constraintdef(oid))
            from pg_constraint where connamespace = 'ibex_core'::regnamespace
            union all select indexdef from pg_indexes where schemaname = 'ibex_core'
            union all select format('%s %s %s %s %s', tablename, policyname, roles, qual, with_check)
            from pg_policies where schemaname = 'ibex_core'
            union all select pg_get_triggerdef(oid) from pg_trigger where not tgisinternal
            union all select format('%s %s', pg_get_functiondef(oid), proacl)
            from pg_proc where pronamespace = 'ibex_core'::regnamespace
            union all select format('%s %s %s %s', relname, relacl, relrowsecurity, relforcerowsecurity)
            from pg_class where relnamespace = 'ibex_core'::regnamespace
            union all select format('%s %s', nspname, nspacl) from pg_namespace where nspname = 'ibex_core'
            """
        )
    finally:
        await connection.close()
    return sorted(row[0] for row in rows)


async def test_up_after_down_makes_the_same_schema(postgres_database: PostgresDatabase) -> None:
    before = await describe(postgres_database.admin_dsn)
    async with postgres_migrator(postgres_database.admin_dsn) as migrator:
        taken_back = [await migrator.down() for _ in KNOWN]
        assert await migrator.down() is None
        assert [status.state for status in await migrator.status()] == ["pending"] * len(KNOWN)
        left = await describe(postgres_database.admin_dsn)
        assert await migrator.up() == KNOWN
        assert await migrator.up() == []
    assert taken_back == KNOWN[::-1]
    assert not [line for line in left if "schema_migrations" not in line and not line.startswith("ibex_core")]
    assert await describe(postgres_database.admin_dsn) == before


async def test_each_step_can_be_taken_back_and_forth(
    target: PostgresTarget, postgres_database: PostgresDatabase
) -> None:
    migrator = Migrator(target, KNOWN)
    for steps in range(1, len(KNOWN) + 1):
        for _ in range(steps):
            await migrator.down()
        assert len(await migrator.up()) == steps


async def test_concurrent_migrators_take_turns(postgres_database: PostgresDatabase) -> None:
    async with postgres_migrator(postgres_database.admin_dsn) as migrator:
        while await migrator.down():
            pass

    async def migrate() -> int:
        async with postgres_migrator(postgres_database.admin_dsn) as migrator:
            return len(await migrator.up())

    assert sorted(await asyncio.gather(*(migrate() for _ in range(4)))) == [0, 0, 0, len(KNOWN)]


async def test_waiting_in_vain_names_the_holder(postgres_database: PostgresDatabase) -> None:
    dsn = postgres_database.admin_dsn
    connection = await asyncpg.connect(dsn, server_settings={"application_name": "the first deployer"})
    try:
        async with (
            PostgresTarget(connection, lock_timeout=5).exclusively(),
            postgres_migrator(dsn, lock_timeout=0.1) as migrator,
        ):
            with pytest.raises(OperatorError, match="the first deployer"):
                await migrator.up()
        async with postgres_migrator(dsn, lock_timeout=0.1) as migrator:
            assert await migrator.up() == []
    finally:
        await connection.close()


async def test_a_changed_file_is_refused_before_anything_runs(target: PostgresTarget) -> None:
    changed = [KNOWN[0]._replace(up_sql=KNOWN[0].up_sql + "-- a word more"), *KNOWN[1:], ONE_MORE]
    migrator = Migrator(target, changed)
    with pytest.raises(SchemaMismatch, match=r"0001_\w+ was applied with other SQL") as caught:
        await migrator.up()
    assert caught.value.hint
    with pytest.raises(SchemaMismatch):
        await migrator.down()
    assert [status.state for status in await migrator.status()] == [
        "changed",
        *["applied"] * (len(KNOWN) - 1),
        "pending",
    ]


async def test_a_migration_that_fails_leaves_nothing(target: PostgresTarget) -> None:
    broken = ONE_MORE._replace(up_sql=ONE_MORE.up_sql + "; select no_such_thing")
    migrator = Migrator(target, [*KNOWN, broken])
    with pytest.raises(OperatorError, match=f"{broken.label} failed.*no_such_thing"):
        await migrator.up()
    assert (await migrator.status())[-1].state == "pending"
    assert await Migrator(target, [*KNOWN, ONE_MORE]).up() == [ONE_MORE]


async def test_a_migration_begins_again_when_a_recorder_is_in_its_way(
    target: PostgresTarget, postgres_database: PostgresDatabase
) -> None:
    """The recorder locks sessions before checkpoints, this migration the other way round: one of them must give way."""
    crossing = "alter table ibex_core.checkpoints add column a int; alter table ibex_core.sessions add column b int"
    recorder = await asyncpg.connect(postgres_database.admin_dsn)
    await recorder.execute("begin; lock table ibex_core.sessions in row exclusive mode")
    migrating = asyncio.ensure_future(Migrator(target, [*KNOWN, ONE_MORE._replace(up_sql=crossing)]).up())
    waiting = "select count(*) from pg_locks where not granted and relation = 'ibex_core.sessions'::regclass"
    while not await recorder.fetchval(waiting):  # noqa: ASYNC110 - the condition is the server's
        await asyncio.sleep(0.01)
    with contextlib.suppress(asyncpg.DeadlockDetectedError):
        await recorder.execute("lock table ibex_core.checkpoints in row exclusive mode")
    await recorder.execute("rollback")
    assert len(await migrating) == 1
    await recorder.close()


async def test_whoever_keeps_callers_from_being_looked_up_holds_up_no_recorder_meanwhile(
    postgres_database: PostgresDatabase,
) -> None:
    """A long transaction holds organizations: what waits for it must not have begun an index, to build it anew."""
    busy = await asyncpg.connect(postgres_database.admin_dsn)
    async with postgres_migrator(postgres_database.admin_dsn) as migrator:
        while (await migrator.down()) != KNOWN[4]:
            pass
        await busy.execute("begin; select from ibex_core.organizations")
        migrating = asyncio.ensure_future(migrator.up())
        waiting = "select count(*) from pg_locks where not granted and relation = 'ibex_core.organizations'::regclass"
        async with asyncio.timeout(10):
            while not await busy.fetchval(waiting):  # noqa: ASYNC110 - it happens in another process
                await asyncio.sleep(0.01)
        await busy.execute("set local lock_timeout = '1s'; lock table ibex_core.checkpoints in row exclusive mode")
        await busy.execute("commit")
        assert await migrating == KNOWN[4:]
    await busy.close()


async def test_a_migration_that_cannot_have_its_locks_says_so(
    target: PostgresTarget, postgres_database: PostgresDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ibex.stores.postgres.schema._LOCK_WAIT_MS", 50)
    monkeypatch.setattr("ibex.stores.postgres.schema._ATTEMPTS", 2)
    busy = await asyncpg.connect(postgres_database.admin_dsn)
    await busy.execute("begin; lock table ibex_core.sessions in row exclusive mode")
    adding = ONE_MORE._replace(up_sql="alter table ibex_core.sessions add column b int")
    with pytest.raises(OperatorError, match=f"{adding.label} failed.*lock timeout"):
        await Migrator(target, [*KNOWN, adding]).up()
    await busy.close()
    assert len(await Migrator(target, [*KNOWN, adding]).up()) == 1


async def test_a_schema_one_migration_ahead_is_served_and_two_are_not(
    target: PostgresTarget, postgres_database: PostgresDatabase
) -> None:
    await Migrator(target, [*KNOWN, ONE_MORE]).up()
    await check_schema(postgres_database.dsn)
    await Migrator(target, [*KNOWN, ONE_MORE, TWO_MORE]).up()
    with pytest.raises(SchemaMismatch):
        await check_schema(postgres_database.dsn)
    assert [status.state for status in await Migrator(target, KNOWN).status()][-2:] == ["unknown", "unknown"]
    with pytest.raises(SchemaMismatch, match="not known here"):
        await Migrator(target, KNOWN).down()


async def test_a_schema_that_is_behind_is_refused_with_the_command(
    target: PostgresTarget, postgres_database: PostgresDatabase
) -> None:
    await check_schema(postgres_database.dsn)
    for _ in KNOWN:
        await Migrator(target, KNOWN).down()
        with pytest.raises(SchemaMismatch) as caught:
            await check_schema(postgres_database.dsn)
        assert "ibexctl migrate up" in (caught.value.hint or "")


async def test_a_database_never_migrated_is_refused_with_the_command(postgres_database: PostgresDatabase) -> None:
    connection = await asyncpg.connect(postgres_database.admin_dsn)
    await connection.execute("drop schema ibex_core cascade")
    await connection.close()
    with pytest.raises(SchemaMismatch, match="no schema"):
        await check_schema(postgres_database.dsn)
    async with postgres_migrator(postgres_database.admin_dsn) as migrator:
        assert [status.state for status in await migrator.status()] == ["pending"] * len(KNOWN)


async def test_the_application_role_may_not_migrate(postgres_database: PostgresDatabase) -> None:
    async with postgres_migrator(postgres_database.dsn) as migrator:
        with pytest.raises(ConfigurationError, match="ibex_app, which may not act as ibex_owner"):
            await migrator.up()


async def test_what_a_superuser_migrates_belongs_to_the_owner(postgres_database: PostgresDatabase) -> None:
    before = await describe(postgres_database.admin_dsn)
    async with postgres_migrator(postgres_database.superuser_dsn) as migrator:
        while await migrator.down():
            pass
        await migrator.up()
    assert await describe(postgres_database.admin_dsn) == before


def write_migrations(directory: Path, *names: str) -> Path:
    for name in names:
        (directory / name).write_text("select 1")
    return directory


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        (["0001_a.up.sql"], "lacks its other direction"),
        (["0002_a.up.sql", "0002_a.down.sql"], "0001 was expected"),
        (["0001_a.up.sql", "0001_a.down.sql", "0001_b.up.sql", "0001_b.down.sql"], "0002 was expected"),
        (["first.sql"], "not called like a migration"),
    ],
)
def test_files_that_are_not_in_order_are_refused(tmp_path: Path, names: list[str], fault: str) -> None:
    with pytest.raises(ConfigurationError, match=fault):
        read_migrations(write_migrations(tmp_path, *names))


def test_migrations_are_read_in_order(tmp_path: Path) -> None:
    names = [f"{number:04}_m{number}.{direction}.sql" for number in range(12, 0, -1) for direction in ("up", "down")]
    assert [migration.number for migration in read_migrations(write_migrations(tmp_path, *names))] == list(range(1, 13))
