"""The pool: transactions scoped to organizations, errors translated, and no patience with a server that hangs."""

import asyncio
import socket
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import asyncpg
import pytest

from ibex.errors import StoreRefused, StoreUnavailable, UnknownEntity
from ibex.stores.postgres.pool import Postgres
from ibex.telemetry import Metrics, render_metrics
from tests.conftest import PostgresDatabase
from tests.relays import Relay, relayed
from tests.tenants import Tenant


@pytest.fixture
async def relay(postgres_database: PostgresDatabase) -> AsyncIterator[Relay]:
    """A way to the database that can be cut or held."""
    async with relayed(postgres_database.dsn) as relay:
        yield relay


async def test_a_transaction_commits_what_it_did(tenant: Tenant, app: Postgres) -> None:
    async with app.transaction(org_ids=[tenant.org_id]) as connection:
        await connection.execute("update ibex_core.tokens set last_used_at = now()")
    async with app.transaction(org_ids=[tenant.org_id]) as connection:
        assert await connection.fetchval("select count(last_used_at) from ibex_core.tokens") == 1


@pytest.mark.parametrize("error", [RuntimeError, UnknownEntity])
async def test_a_transaction_that_fails_keeps_nothing(error: type[Exception], tenant: Tenant, app: Postgres) -> None:
    with pytest.raises(error):  # noqa: PT012
        async with app.transaction(org_ids=[tenant.org_id]) as connection:
            await connection.execute("update ibex_core.tokens set last_used_at = now()")
            raise error
    async with app.transaction(org_ids=[tenant.org_id]) as connection:
        assert await connection.fetchval("select count(last_used_at) from ibex_core.tokens") == 0


async def test_an_error_that_was_swallowed_is_not_taken_for_a_commit(tenant: Tenant, app: Postgres) -> None:
    with pytest.raises(StoreRefused, match="rolled the transaction back"):  # noqa: PT012
        async with app.transaction(org_ids=[tenant.org_id]) as connection:
            await connection.execute("update ibex_core.tokens set last_used_at = now()")
            with pytest.raises(asyncpg.DivisionByZeroError):
                await connection.execute("select 1 / 0")


async def test_scopes_do_not_outlive_their_transaction(tenant: Tenant, postgres_database: PostgresDatabase) -> None:
    app = await Postgres.connect(postgres_database.dsn, name="test", max_size=1)
    for scope in ({"org_ids": [tenant.org_id]}, {"token_id": tenant.token_id}):
        async with app.transaction(**scope) as connection:
            assert await connection.fetchval("select count(*) from ibex_core.tokens") == 1
        async with app.transaction() as connection:
            assert await connection.fetchval("select count(*) from ibex_core.tokens") == 0
        with pytest.raises(RuntimeError):
            async with app.transaction(**scope):
                raise RuntimeError
        async with app.transaction() as connection:
            assert await connection.fetchval("select count(*) from ibex_core.tokens") == 0
    await app.close()


async def test_a_presented_token_shows_its_row_and_nothing_else(tenants: tuple[Tenant, Tenant], app: Postgres) -> None:
    async with app.transaction(token_id=tenants[0].token_id) as connection:
        rows = await connection.fetch("select token_id from ibex_core.tokens")
        agents = await connection.fetchval("select count(*) from ibex_core.agents")
        changed = await connection.execute("update ibex_core.tokens set last_used_at = now()")
    assert ([row["token_id"] for row in rows], agents, changed) == ([tenants[0].token_id], 0, "UPDATE 0")


@pytest.mark.parametrize(
    ("statement", "values"),
    [
        ("select 'the secret'::uuid", ()),
        ("select $1::int", ("the secret",)),
        ("select $1::text", ("the secret\0",)),
        ("select $1::text", ("the secret \ud800",)),
        (
            "insert into ibex_core.organizations (org_id, name, status) values (gen_random_uuid(), 'x', 'the secret')",
            (),
        ),
    ],
)
async def test_refusals_never_quote_the_data(statement: str, values: tuple[object, ...], owner: Postgres) -> None:
    with pytest.raises(StoreRefused) as caught:
        async with owner.transaction() as connection:
            await connection.execute(statement, *values)
    error: BaseException | None = caught.value
    while error is not None:
        assert "secret" not in str(error)
        error = error.__cause__


async def test_a_store_that_is_away_is_used_again_once_it_is_back(relay: Relay) -> None:
    await relay.stop()
    app = await Postgres.connect(relay.dsn, name="test")
    with pytest.raises(StoreUnavailable):
        async with app.transaction():
            pass
    await relay.start()
    async with app.transaction() as connection:
        assert await connection.fetchval("select 1") == 1
    await relay.stop()
    with pytest.raises(StoreUnavailable):
        async with app.transaction() as connection:
            await connection.fetchval("select 1")
    await relay.start()
    async with app.transaction() as connection:
        assert await connection.fetchval("select 1") == 1
    await app.close()


async def test_a_server_that_hangs_costs_the_deadline_and_no_connection(relay: Relay) -> None:
    app = await Postgres.connect(relay.dsn, name="test", max_size=2)
    relay.hold()
    for _ in range(4):
        with pytest.raises(StoreUnavailable, match="in time"):
            async with app.transaction(timeout=0.1) as connection:
                await connection.fetchval("select 1")
    relay.release()
    async with app.transaction(timeout=5) as connection:
        assert await connection.fetchval("select 1") == 1
    await app.close()


async def test_a_statement_that_is_cancelled_gives_its_connection_up(app: Postgres) -> None:
    async def sleep() -> None:
        async with app.transaction() as connection:
            await connection.execute("select pg_sleep(60)")

    tasks = [asyncio.get_running_loop().create_task(sleep()) for _ in range(8)]
    await asyncio.sleep(0.2)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    async with app.transaction(timeout=5) as connection:
        assert await connection.fetchval("select 1") == 1


async def test_a_pool_that_is_used_up_is_waited_for_no_longer_than_the_deadline(
    postgres_database: PostgresDatabase,
) -> None:
    app = await Postgres.connect(postgres_database.dsn, name="test", max_size=1)
    async with app.transaction():
        with pytest.raises(StoreUnavailable, match="in time"):
            async with app.transaction(timeout=0.1):
                pass
    await app.close()


@pytest.mark.parametrize("part", ["password", "database"])
async def test_a_log_in_that_is_refused_is_unavailability(part: str, postgres_database: PostgresDatabase) -> None:
    where = urlsplit(postgres_database.dsn)
    if part == "password":
        where = where._replace(netloc=f"ibex_app:wrong@{where.netloc.rpartition('@')[2]}")
    else:
        where = where._replace(path="/nowhere")
    app = await Postgres.connect(where.geturl(), name="test")
    with pytest.raises(StoreUnavailable):
        async with app.transaction():
            pass
    await app.close()


async def test_the_server_knows_who_is_connected(postgres_database: PostgresDatabase) -> None:
    app = await Postgres.connect(postgres_database.dsn, name="ibex worker 7")
    async with app.transaction() as connection:
        assert await connection.fetchval("select current_setting('application_name')") == "ibex worker 7"
    await app.close()


async def test_transactions_are_measured_by_operation(postgres_database: PostgresDatabase) -> None:
    metrics = Metrics()
    app = await Postgres.connect(postgres_database.dsn, name="test", metrics=metrics)
    async with app.transaction(operation="find_credential"):
        pass
    text = render_metrics([metrics.snapshot()]).decode()
    assert 'ibex_db_query_duration_seconds_count{operation="find_credential"} 1.0' in text
    assert 'ibex_db_pool_open_connections{state="idle"} 1.0' in text
    await app.close()


async def test_a_port_where_nobody_listens_delays_no_start() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        app = await Postgres.connect(f"postgresql://nobody:x@127.0.0.1:{port}/none", name="test")
        with pytest.raises(StoreUnavailable):
            async with app.transaction():
                pass
        await app.close()
