"""Postgres' schema: how migrations run on it, what serving needs of it, and the development seed."""

import asyncio
import os
import random
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import asyncpg

from ibex.domain.identity import (
    DEV_AGENT_ID,
    DEV_ORG_ID,
    DEV_TOKEN,
    DEV_TOKEN_ID,
    DEV_USER_ID,
    PROXY_CHAT,
    digest_bearer,
)
from ibex.errors import ConfigurationError, OperatorError, StoreError, StoreUnavailable
from ibex.stores.migrations import AppliedMigration, Migration, Migrator, check_applied, find_migrations
from ibex.stores.postgres.address import PostgresAddress
from ibex.stores.postgres.pool import translated

_LOCK = 0x1BE8_5C4E
"""The advisory lock of whoever migrates."""

_ATTEMPTS = 10
_LOCK_WAIT_MS = 2000

_OLDEST_SERVER = 15
"""The first with unique constraints in which nulls are equal."""

_ROLES_HINT = "Create the roles first: psql -f infra/scripts/postgres_roles.sql, as a superuser."


class PostgresTarget:
    """One connection on which migrations run as ibex_owner."""

    name = "postgres"

    def __init__(self, connection: "asyncpg.Connection[asyncpg.Record]", lock_timeout: float) -> None:
        self._connection = connection
        self._lock_timeout = lock_timeout

    @asynccontextmanager
    async def exclusively(self) -> AsyncIterator[None]:
        """Hold the advisory lock. Raises OperatorError naming the holder when it is not had in time."""
        with translated():
            self._check_server()
            await self._become_owner()
            await self._connection.execute(f"set lock_timeout = {int(self._lock_timeout * 1000)}")
        await self._lock()
        try:
            with translated():
                await self._connection.execute(_BOOTSTRAP)
            yield
        finally:
            if not self._connection.is_closed():  # a connection that is gone has let go of its locks
                with translated():
                    await self._connection.execute("select pg_advisory_unlock($1)", _LOCK)

    async def applied(self) -> list[AppliedMigration]:
        """What has been applied; empty on a database that never was migrated."""
        with translated():
            return await _read_applied(self._connection)

    async def apply(self, migration: Migration) -> None:
        """Run `up_sql` and note it, in one transaction."""
        note = "insert into ibex_core.schema_migrations (number, name, checksum) values ($1, $2, $3)"
        await self._run(migration, migration.up_sql, note, migration.number, migration.name, migration.checksum)

    async def revert(self, migration: Migration) -> None:
        """Run `down_sql` and strike the note out, in one transaction."""
        strike = "delete from ibex_core.schema_migrations where number = $1"
        await self._run(migration, migration.down_sql, strike, migration.number)

    async def _run(self, migration: Migration, sql: str, note: str, *values: int | str) -> None:
        """Both statements or neither; begun again when a server that works on the tables is in the way.

        A lock that is waited for stops all who come after it, so it is not waited for long.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            with _explained(migration):
                try:
                    async with self._connection.transaction():
                        await self._connection.execute(f"set local lock_timeout = {_LOCK_WAIT_MS}")
                        await self._connection.execute(sql)
                        await self._connection.execute(note, *values)
                except (asyncpg.DeadlockDetectedError, asyncpg.LockNotAvailableError):
                    if attempt == _ATTEMPTS:
                        raise
                else:
                    return
            await asyncio.sleep(random.uniform(0.2, 0.5) * attempt)  # noqa: S311 - jitter

    def _check_server(self) -> None:
        version = self._connection.get_server_version()
        if version.major < _OLDEST_SERVER:
            raise ConfigurationError(f"Postgres {version.major} is too old; ibex needs {_OLDEST_SERVER} or later.")

    async def _become_owner(self) -> None:
        """What migrations make belongs to ibex_owner: its functions and policies depend on that."""
        roles = await self._connection.fetch("select rolname from pg_roles where rolname in ('ibex_owner', 'ibex_app')")
        missing = sorted({"ibex_owner", "ibex_app"} - {row["rolname"] for row in roles})
        if missing:
            raise ConfigurationError(f"Postgres has no role {' and no role '.join(missing)}.", hint=_ROLES_HINT)
        try:
            await self._connection.execute("set role ibex_owner")
        except asyncpg.InsufficientPrivilegeError:
            user = await self._connection.fetchval("select session_user")
            raise ConfigurationError(
                f"The admin DSN logs in as {user}, which may not act as ibex_owner.",
                hint="Let IBEX_POSTGRES_ADMIN_DSN log in as ibex_owner, or grant ibex_owner to that role.",
            ) from None

    async def _lock(self) -> None:
        try:
            with translated():
                await self._connection.execute("select pg_advisory_lock($1)", _LOCK)
        except StoreUnavailable as error:
            if not isinstance(error.__cause__, asyncpg.LockNotAvailableError):
                raise
            row = await self._connection.fetchrow(_HOLDER, _LOCK & 0xFFFF_FFFF)
            holder = (
                f"{row['application_name'] or 'a session of another role'} (backend {row['pid']})"
                if row
                else "somebody"
            )
            raise OperatorError(
                f"{holder} is migrating this database; waited {self._lock_timeout:g} s for it.",
                hint="Wait for it to end, then try again.",
            ) from None


@contextmanager
def _explained(migration: Migration) -> Iterator[None]:
    """A migration's own failure, in Postgres' words: they are about the schema, and the operator needs them."""
    try:
        with translated():
            yield
    except StoreError as error:
        reason = error.__cause__.args[0] if isinstance(error.__cause__, asyncpg.PostgresError) else error.message
        raise OperatorError(f"Migration {migration.label} failed, and nothing of it was kept: {reason}") from error


_HOLDER = """
select l.pid, a.application_name from pg_locks as l left join pg_stat_activity as a using (pid)
where l.locktype = 'advisory' and l.granted and l.objid = $1
  and l.database = (select oid from pg_database where datname = current_database())
"""

_BOOTSTRAP = """
create schema if not exists ibex_core;
create table if not exists ibex_core.schema_migrations (
    number integer primary key,
    name text not null,
    checksum text not null,
    applied_at timestamptz not null default clock_timestamp()
);
grant usage on schema ibex_core to ibex_app;
grant select on ibex_core.schema_migrations to ibex_app;
"""


@asynccontextmanager
async def postgres_migrator(
    admin_dsn: str, *, holder: str | None = None, lock_timeout: float = 30
) -> AsyncIterator[Migrator]:
    """A migrator on a connection of its own. `holder` is the name others see who wait for its lock.

    Raises ConfigurationError when a pooler is in between: the lock is the connection's.
    """
    if PostgresAddress.parse(admin_dsn).is_pooled:
        raise ConfigurationError(
            "Migrations need a connection that stays theirs, and the admin DSN goes through a pooler (pgbouncer=true).",
            hint="Let IBEX_POSTGRES_ADMIN_DSN name Postgres itself.",
        )
    async with _connected(
        admin_dsn, holder or f"ibex migrate, process {os.getpid()} on {socket.gethostname()}"
    ) as connection:
        yield Migrator(PostgresTarget(connection, lock_timeout), find_migrations("postgres"))


async def check_schema(dsn: str) -> None:
    """Raise SchemaMismatch, naming the command, unless this version of ibex can serve on the schema as it is."""
    async with _connected(dsn, "ibex schema check") as connection:
        with translated():
            async with connection.transaction(readonly=True):
                applied = await _read_applied(connection)
    check_applied("postgres", find_migrations("postgres"), applied)


async def seed_development(admin_dsn: str) -> None:
    """Make the development organization, user, agent and token where they are missing. A row that is there is kept."""
    async with _connected(admin_dsn, "ibex seed") as connection:
        with translated():
            async with connection.transaction():
                for statement, values in _SEED:
                    await connection.execute(f"{statement} on conflict do nothing", *values)


_INSERT_CREDENTIAL = """
insert into ibex_core.tokens (token_id, org_id, user_id, name, prefix, digest, permissions)
values ($1, $2, $3, 'Development', 'ibex_dev_sk', $4, $5)
"""

_SEED: tuple[tuple[str, tuple[object, ...]], ...] = (
    ("insert into ibex_core.organizations (org_id, name) values ($1, 'Development')", (DEV_ORG_ID,)),
    ("insert into ibex_core.users (user_id, org_id, name) values ($1, $2, 'Developer')", (DEV_USER_ID, DEV_ORG_ID)),
    ("insert into ibex_core.agents (agent_id, org_id, name) values ($1, $2, 'dev')", (DEV_AGENT_ID, DEV_ORG_ID)),
    (_INSERT_CREDENTIAL, (DEV_TOKEN_ID, DEV_ORG_ID, DEV_USER_ID, digest_bearer(DEV_TOKEN), int(PROXY_CHAT))),
)


@asynccontextmanager
async def _connected(dsn: str, name: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    address = PostgresAddress.parse(dsn)
    with translated():
        connection = await asyncpg.connect(
            address.dsn, timeout=10, server_settings={"application_name": name[:63]}, **address.options
        )
    try:
        yield connection
    finally:
        try:
            await connection.close(timeout=2)
        except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            connection.terminate()


async def _read_applied(connection: "asyncpg.Connection[asyncpg.Record]") -> list[AppliedMigration]:
    if await connection.fetchval("select to_regclass('ibex_core.schema_migrations')") is None:
        return []
    rows = await connection.fetch(
        "select number, name, checksum, applied_at from ibex_core.schema_migrations order by number"
    )
    return [AppliedMigration(**row) for row in rows]
