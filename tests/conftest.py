"""Real stores for tests: the embedded engines once a session, and a database of its own in each for every test."""

import asyncio
import base64
import itertools
import os
import shutil
import tempfile
import urllib.request
from collections.abc import AsyncIterator, Collection, Coroutine, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import asyncpg
import pytest
import redis

from ibex.config import Settings, load_settings
from ibex.engines.addresses import ALL_STORES, StoreAddresses
from ibex.engines.embedded import EmbeddedEngines
from ibex.engines.postgres import OWNER, SUPERUSER
from ibex.stores.postgres.schema import postgres_migrator

pytest_plugins = ["tests.sharing"]

TEMPLATE = "ibex_template"

UNSAFE_AND_QUICK = {"fsync": "off", "full_page_writes": "off"}
"""For a PostgreSQL whose data survives its own death, but not the machine's."""

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class PostgresDatabase:
    """A database of one test."""

    name: str
    dsn: str
    """As ibex_app, the application's role."""
    admin_dsn: str
    """As ibex_owner."""
    superuser_dsn: str


def run_apart(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run to the end on a loop of its own, leaving pytest-asyncio's alone."""
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        return runner.run(coroutine)


@contextmanager
def new_data_dir() -> Iterator[Path]:
    """A data directory with a path short enough for sockets; its engines must have been stopped when it is removed."""
    path = Path(tempfile.mkdtemp(prefix="ibex-"))
    try:
        yield path
    finally:
        remove_data_dir(path)


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """A data directory of one test."""
    with new_data_dir() as path:
        yield path


@pytest.fixture
def embedded_settings(data_dir: Path) -> Settings:
    """Settings of a server that has its own data directory and nothing else set."""
    return settings_of(data_dir)


def settings_of(data_dir: Path) -> Settings:
    """The defaults with this data directory, whatever the environment says."""
    return load_settings({"IBEX_ENV_FILE": os.devnull, "IBEX_DATA_DIR": str(data_dir)})


def remove_data_dir(data_dir: Path) -> None:
    """Remove a data directory, and what PostgreSQL as root keeps outside it."""
    pointer = data_dir / "postgres-home"
    if pointer.exists():
        shutil.rmtree(pointer.read_text().strip(), ignore_errors=True)
    shutil.rmtree(data_dir, ignore_errors=True)


def quick_engines(settings: Settings, stores: Collection[str] = ALL_STORES) -> EmbeddedEngines:
    """The real engines, but for PostgreSQL's waiting for the disk."""
    return EmbeddedEngines(settings, stores=stores, postgres_options=UNSAFE_AND_QUICK)


@pytest.fixture(scope="session")
def running_engines_session() -> Iterator[EmbeddedEngines]:
    """All embedded engines, running until the session's end."""
    with new_data_dir() as data_dir:
        engines = quick_engines(settings_of(data_dir))
        with engines.directory.lock():
            run_apart(engines.start())
            try:
                yield engines
            finally:
                run_apart(engines.stop())


@pytest.fixture(scope="session")
def engines_session(running_engines_session: EmbeddedEngines) -> StoreAddresses:
    """Where the engines are. Their databases are shared by the session: use the fixtures below, which are not."""
    return running_engines_session.addresses


@pytest.fixture
def redis_url(engines_session: StoreAddresses) -> str:
    """An empty Valkey."""
    with closing(redis.from_url(engines_session.redis)) as client:
        client.flushall()
        client.script_flush()
    return engines_session.redis


@pytest.fixture
def clickhouse_dsn(engines_session: StoreAddresses) -> Iterator[str]:
    """An empty ClickHouse database."""
    database = f"test_{next(_numbers)}"
    run_clickhouse(engines_session.clickhouse, f"CREATE DATABASE {database}")
    yield urlsplit(engines_session.clickhouse)._replace(path=f"/{database}").geturl()
    run_clickhouse(engines_session.clickhouse, f"DROP DATABASE {database} SYNC")


def run_clickhouse(dsn: str, statement: str, data: bytes = b"") -> str:
    """Run one statement in the DSN's database and return the answer's text, without a client library."""
    where = urlsplit(dsn)
    credentials = base64.b64encode(f"{where.username}:{where.password}".encode()).decode()
    request = urllib.request.Request(
        f"http://{where.hostname}:{where.port}/?database={quote(where.path[1:])}",
        data=statement.encode() + data,
        headers={"Authorization": f"Basic {credentials}"},
    )
    with urllib.request.urlopen(request) as response:
        answer: bytes = response.read()
    return answer.decode()


@pytest.fixture(scope="session")
def postgres_template(running_engines_session: EmbeddedEngines) -> str:
    """The name of a migrated database that nobody is connected to."""
    postgres = running_engines_session.postgres
    assert postgres is not None

    async def make() -> None:
        await _as_superuser(postgres.dsn_of(SUPERUSER, "postgres"), f"CREATE DATABASE {TEMPLATE} OWNER {OWNER}")
        async with postgres_migrator(postgres.dsn_of(OWNER, TEMPLATE), holder="tests") as migrator:
            await migrator.up()

    run_apart(make())
    return TEMPLATE


@pytest.fixture
async def postgres_database(
    running_engines_session: EmbeddedEngines, postgres_template: str
) -> AsyncIterator[PostgresDatabase]:
    """A migrated, empty Postgres database; connections that a test leaves open are cut."""
    async with _new_postgres_database(running_engines_session, postgres_template) as database:
        yield database


@pytest.fixture
async def bare_postgres_database(running_engines_session: EmbeddedEngines) -> AsyncIterator[PostgresDatabase]:
    """A Postgres database with nothing in it, no schema either."""
    async with _new_postgres_database(running_engines_session, "template1") as database:
        yield database


@asynccontextmanager
async def _new_postgres_database(engines: EmbeddedEngines, template: str) -> AsyncIterator[PostgresDatabase]:
    postgres = engines.postgres
    assert postgres is not None
    name, superuser = f"test_{next(_numbers)}", postgres.dsn_of(SUPERUSER, "postgres")
    await _as_superuser(superuser, f"CREATE DATABASE {name} OWNER {OWNER} TEMPLATE {template}")
    yield PostgresDatabase(
        name, postgres.dsn_of("ibex_app", name), postgres.dsn_of(OWNER, name), postgres.dsn_of(SUPERUSER, name)
    )
    await _as_superuser(superuser, f"DROP DATABASE {name} WITH (FORCE)")


async def _as_superuser(dsn: str, statement: str) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()
