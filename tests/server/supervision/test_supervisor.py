"""The supervisor with small workers, on the session's stores: sockets, restarts, shares, metrics, drain."""

import asyncio
import os
import signal
import socket
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import aiohttp
import asyncpg
import pytest
import redis

from ibex.config import Secret, Settings
from ibex.errors import ConfigurationError, OperatorError, SchemaMismatch, ServerNotRunning
from ibex.server.supervision.status import request_status
from ibex.server.supervision.supervisor import Supervisor
from ibex.stores.postgres.schema import seed_development
from ibexctl.serve import describe
from tests.server.nodes import SMALL_WORKER, Node, eventually, is_alive, running


async def test_a_node_serves_tells_its_status_and_leaves_nothing_behind(settings: Settings) -> None:
    with pytest.raises(ServerNotRunning):
        request_status(settings)

    async with running(settings) as node:
        answered_by = await node.pids()
        status = await asyncio.to_thread(request_status, settings)
        environment = await node.ask("/environment")
        sessions = {os.getsid(pid) for pid in answered_by}
        await node.stop()

    assert [process.name for process in status.processes] == ["supervisor", "worker 0", "worker 1"]
    assert answered_by == {process.pid for process in status.processes[1:]}
    assert [process.title for process in status.processes[1:]] == ["ibex: worker 0", "ibex: worker 1"]
    assert all(process.is_up and process.memory_bytes for process in status.processes)
    assert status.url == node.status.url
    assert status.llm_mode == "live"
    assert sessions == answered_by, "each child has a session of its own"
    assert environment["IBEX_OPENAI_API_KEY"] == "sk-of-the-provider"
    assert not any(is_alive(pid) for pid in answered_by)
    with pytest.raises(ServerNotRunning):
        request_status(settings)
    with pytest.raises(aiohttp.ClientConnectorError):
        async with aiohttp.ClientSession() as http:
            await http.get(status.url)


async def test_a_killed_worker_is_missed_by_nobody_and_comes_back(settings: Settings) -> None:
    async with running(settings) as node:
        victim, other = node.pid("worker 0"), node.pid("worker 1")
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        await eventually(lambda: _returns(node.pid("worker 0") != victim))
        meanwhile = await node.pids()
        await eventually(lambda: _returns(node.pid("worker 0") not in {victim, None}))
        successor = node.pid("worker 0")
        await eventually(lambda: _answered_by(node, {successor, other}))
        restarts = {process.name: process.restarts for process in node.status.processes}
        await eventually(lambda: _returns(_listeners(node) == {1}))

    assert meanwhile <= {other, successor}
    assert restarts == {"supervisor": 0, "worker 0": 1, "worker 1": 0}


async def test_a_neighbour_accepts_on_the_socket_of_a_worker_that_is_away(settings: Settings) -> None:
    async with running(settings) as node:
        victim, other = node.pid("worker 0"), node.pid("worker 1")
        assert victim is not None
        os.kill(victim, signal.SIGSTOP)  # half of all connections wait in its queue
        waiting = asyncio.gather(*(node.ask() for _ in range(20)))
        done, _ = await asyncio.wait({waiting}, timeout=0.3)
        assert not done
        os.kill(victim, signal.SIGKILL)
        answered_by = {answer["pid"] for answer in await asyncio.wait_for(waiting, 10)}

    assert other in answered_by
    assert victim not in answered_by


async def test_what_a_worker_shares_reaches_the_others_and_their_successors(settings: Settings) -> None:
    async with running(settings) as node:
        for text in ("a=1", "b=2", "a=3"):
            await node.ask(f"/share?{text}")
        await eventually(lambda: _heard_everywhere(node, {"a=3", "b=2"}))
        for name in ("worker 0", "worker 1"):
            victim = node.pid(name)
            assert victim is not None
            os.kill(victim, signal.SIGKILL)
            await eventually(lambda name=name, victim=victim: _returns(node.pid(name) not in {victim, None}))
        successors = [await node.ask("/heard") for _ in range(20)]

    assert all(heard == ["b=2", "a=3"] for heard in successors)


async def test_the_node_counts_on_when_a_worker_dies(settings: Settings) -> None:
    async with running(settings) as node:
        for _ in range(10):
            await node.ask("/count")
        counted = 'ibex_proxy_requests_total{method="GET",route="/count",status_code="200"} 10.0'
        await eventually(lambda: _contains(node, counted))
        for name in ("worker 0", "worker 1"):
            victim = node.pid(name)
            assert victim is not None
            os.kill(victim, signal.SIGKILL)
            await eventually(lambda name=name, victim=victim: _returns(node.pid(name) not in {victim, None}))
        text = await node.ask("/metrics")

    assert counted in text
    assert 'ibex_process_up{process="worker 0"} 1.0' in text
    assert 'ibex_process_up{process="supervisor"} 1.0' in text
    assert 'ibex_process_restarts_total{process="worker 0"} 1.0' in text
    assert 'ibex_build_info{version="' in text


async def test_a_request_under_way_is_finished_before_the_node_stops(settings: Settings) -> None:
    async with running(settings) as node:
        slow = asyncio.gather(*(node.ask("/slow?0.5") for _ in range(4)))
        await asyncio.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)
        result = await asyncio.wait_for(node.task, 30)

        assert len(await slow) == 4
        assert result.is_clean
        assert not result.is_hurried


@pytest.mark.parametrize(
    ("argument", "message", "hint"),
    [
        ("--broken", "worker 0: it is broken", "Mend it."),
        ("--dead", "The process worker 0 did not start.", "Its own messages are above."),
    ],
)
async def test_a_worker_that_cannot_start_is_reported(
    settings: Settings, argument: str, message: str, hint: str
) -> None:
    with pytest.raises(OperatorError) as failed:
        async with running(settings, worker=(*SMALL_WORKER, argument)):
            pass

    assert (failed.value.message, failed.value.hint) == (message, hint)


async def test_a_stop_while_it_starts_ends_the_start(settings: Settings) -> None:
    is_ready = asyncio.Event()
    supervisor = Supervisor(
        settings, on_ready=lambda _: is_ready.set(), worker=(*SMALL_WORKER, "--stuck"), has_recorder=False
    )
    task = asyncio.get_running_loop().create_task(supervisor.run())
    await eventually(lambda: _returns(len(supervisor.status().processes) == 3))
    pids = [process.pid for process in supervisor.status().processes[1:]]

    supervisor.stop()
    supervisor.stop()
    await asyncio.wait_for(task, 20)

    assert not is_ready.is_set()
    assert not any(is_alive(pid) for pid in pids)


async def test_a_port_in_use_is_reported_before_anything_starts(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OperatorError, match=f"Port {port} of 127.0.0.1 is in use"):
            await Supervisor(settings.model_copy(update={"port": port})).run()


async def test_a_real_database_is_never_migrated_by_serve(settings: Settings, engines_session: Any) -> None:
    unmigrated = settings.model_copy(update={"postgres_dsn": Secret(engines_session.postgres)})

    with pytest.raises(SchemaMismatch) as mismatch:
        await Supervisor(unmigrated).run()

    assert "ibexctl migrate up" in (mismatch.value.hint or "")


async def test_a_node_starts_without_clickhouse(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        away = f"clickhouse://ibex:secret@127.0.0.1:{nobody.getsockname()[1]}/ibex"

    async with running(settings.model_copy(update={"clickhouse_dsn": Secret(away)})) as node:
        assert len(await node.pids()) == 2

    assert "clickhouse was not checked" in caplog.messages


async def test_a_journal_that_is_full_at_the_start_is_told_of(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    settings.journal_dir.mkdir(parents=True)
    greedy = settings.model_copy(update={"journal_min_free_bytes": 1 << 60, "workers": 1})
    async with running(greedy) as node:
        (warning,) = node.status.warnings
        shown = str(describe(node.status, greedy).views)

    assert warning.startswith("chats are refused, since the journal is past its bounds: its disk has ")
    assert "IBEX_JOURNAL_MIN_FREE_BYTES is 1,099,511,627,776 MiB" in warning
    assert warning in shown
    assert "chats are refused" in caplog.messages


async def test_production_serves_its_metrics_apart(production: Settings) -> None:
    async with running(production) as node, node.http.get(node.status.metrics_url) as response:
        assert "ibex_process_up" in await response.text()
        assert node.status.metrics_url.rpartition(":")[0] == "http://127.0.0.1"
        assert node.status.metrics_url != f"{node.status.url}/metrics"


async def test_production_refuses_the_development_token_until_it_is_deleted(
    production: Settings, postgres_database: Any
) -> None:
    await seed_development(postgres_database.admin_dsn)

    with pytest.raises(ConfigurationError, match="development token") as caught:
        await Supervisor(production).run()

    assert caught.value.hint is not None
    connection = await asyncpg.connect(postgres_database.admin_dsn)
    await connection.execute(caught.value.hint.partition("as its owner: ")[2])
    await connection.close()
    async with running(production) as node:
        assert len(await node.pids()) == 2


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("alter role {role} superuser", "is a superuser"),
        ("alter role {role} bypassrls", "bypasses row security"),
        ("grant ibex_owner to {role}", "owns what it should only use"),
    ],
)
async def test_production_refuses_a_role_that_row_security_does_not_bind(
    production: Settings, postgres_database: Any, statement: str, reason: str
) -> None:
    role = f"ibex_strong_{uuid4().hex[:8]}"
    connection = await asyncpg.connect(postgres_database.superuser_dsn)
    await connection.execute(f"create role {role} login password 'strong' in role ibex_app")
    try:
        await connection.execute(statement.format(role=role))
        where = urlsplit(postgres_database.dsn)
        host = where.netloc.rpartition("@")[2]
        dsn = where._replace(netloc=f"{role}:strong@{host}").geturl()
        with pytest.raises(ConfigurationError, match=f"{role}, which {reason}") as caught:
            await Supervisor(production.model_copy(update={"postgres_dsn": Secret(dsn)})).run()
        assert "ibex_app" in str(caught.value.hint)
        assert "strong@" not in caught.value.message
    finally:
        await connection.execute(f"drop role {role}")
        await connection.close()


async def test_production_refuses_a_redis_that_forgets_limits(production: Settings, redis_url: str) -> None:
    with closing(redis.from_url(redis_url)) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            with pytest.raises(ConfigurationError, match="allkeys-lru") as caught:
                await Supervisor(production).run()
        finally:
            client.config_set("maxmemory-policy", "noeviction")

    assert "noeviction" in str(caught.value.hint)


async def test_production_starts_while_redis_is_away(production: Settings, caplog: pytest.LogCaptureFixture) -> None:
    async with running(production.model_copy(update={"redis_url": Secret("redis://127.0.0.1:1")})) as node:
        assert len(await node.pids()) == 2

    assert "redis was not checked" in caplog.messages


async def test_a_node_that_serves_without_a_token_never_becomes_ready(settings: Settings) -> None:
    with pytest.raises(OperatorError, match="200” and not with 401"):
        async with running(settings, worker=(*SMALL_WORKER, "--open")):
            pytest.fail("it was announced")


async def _returns(value: bool) -> bool:
    return value


async def _answered_by(node: Node, pids: set[int | None]) -> bool:
    return await node.pids() == pids


async def _heard_everywhere(node: Node, texts: set[str]) -> bool:
    answers = [await node.ask("/heard") for _ in range(10)]
    heard = {text for answer in answers for text in answer}
    return texts <= heard


async def _contains(node: Node, line: str) -> bool:
    return line in await node.ask("/metrics")


def _listeners(node: Node) -> set[object]:
    return {process.facts.get("listeners") for process in node.status.processes if process.facts}
