"""Postgres is restored from a backup under a running worker: it believes the restored rows, not what it remembers."""

from urllib.parse import urlsplit

import asyncpg

from ibex.domain.directives import DirectiveMode
from tests.conftest import PostgresDatabase
from tests.server.conftest import Edge
from tests.server.nodes import eventually


class Backups:
    """Copies of one database, taken and put back while a worker uses it; it is cut off meanwhile."""

    def __init__(self, database: PostgresDatabase) -> None:
        self._name = database.name
        self._dsn = urlsplit(database.superuser_dsn)._replace(path="/postgres").geturl()

    async def take(self) -> None:
        """Keep the database as it is."""
        await self._run(f"create database {self._name}_backup template {self._name}")

    async def restore(self) -> None:
        """Put the database back as it was."""
        await self._run(f"drop database {self._name}", f"alter database {self._name}_backup rename to {self._name}")

    async def _run(self, *statements: str) -> None:
        connection = await asyncpg.connect(self._dsn)
        await connection.execute(f"alter database {self._name} allow_connections false")
        await connection.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where datname = $1", self._name
        )
        for statement in statements:
            await connection.execute(statement)
        await connection.execute(f"alter database {self._name} allow_connections true")
        await connection.close()


async def test_after_a_restore_the_backups_rows_hold(edge: Edge, postgres_database: PostgresDatabase) -> None:
    backups = Backups(postgres_database)
    await edge.directives.set(edge.tenant.agent_id, "As backed up.", DirectiveMode.SYSTEM_FIRST)
    await backups.take()

    async def asks(bearer: str) -> int:
        status, _, _ = await edge.chat(headers={"Authorization": f"Bearer {bearer}"})
        return status

    async def is_answered(bearer: str, status: int) -> bool:
        return await asks(bearer) == status

    _, minted_later = await edge.admin.mint_token(edge.tenant.org_id)
    await edge.directives.set(edge.tenant.agent_id, "Never backed up.", DirectiveMode.SYSTEM_FIRST)
    await edge.admin.revoke_token(edge.tenant.token_id)
    await eventually(lambda: is_answered(edge.tenant.bearer, 401))
    await eventually(lambda: is_answered(minted_later, 200))
    assert edge.last_turn().directive_version == 2

    await backups.restore()

    await eventually(lambda: is_answered(minted_later, 401))
    await eventually(lambda: is_answered(edge.tenant.bearer, 200))
    assert edge.last_turn().directive_version == 1
