"""A rolling restart: what replaces whom, and when it is refused so that the old workers go on."""

import asyncio
import os
import signal

import pytest

from ibex.config import Secret, Settings
from ibex.errors import ConfigurationError, OperatorError
from ibex.server.supervision.status import request_reload
from tests.relays import relayed
from tests.server.nodes import Node, eventually, is_alive, running


async def test_a_rolling_restart_refuses_no_connection(settings: Settings) -> None:
    reloaded = settings.model_copy(update={"log_level": "debug"})
    async with running(settings, reload=lambda: reloaded) as node:
        former = await node.pids()
        os.kill(os.getpid(), signal.SIGHUP)
        answers = 0
        while former & {node.pid("worker 0"), node.pid("worker 1")} or answers < 100:
            await node.ask()
            answers += 1
        await eventually(lambda: _returns(not any(is_alive(pid) for pid in former)))
        present = await node.pids()
        environment = await node.ask("/environment")

    assert not former & present
    assert len(present) == 2
    assert environment["IBEX_LOG_LEVEL"] == "debug"


async def test_every_request_to_reload_is_heeded_after_the_one_under_way(settings: Settings) -> None:
    read: list[str] = []

    def reload() -> Settings:
        read.append("again")
        return settings.model_copy(update={"sandbox_gap_ms": len(read)})

    async with running(settings, reload=reload) as node:
        os.kill(os.getpid(), signal.SIGHUP)
        await eventually(lambda: _returns(len(read) == 1))
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGHUP)
            await asyncio.sleep(0.05)
        await eventually(lambda: _returns(len(read) == 2))
        result = await asyncio.to_thread(request_reload, settings)
        environment = await node.ask("/environment")

    assert result.replaced == ["worker 0", "worker 1"]
    assert len(read) == 3
    assert environment["IBEX_SANDBOX_GAP_MS"] == "3"


async def test_wrong_settings_are_refused_and_the_old_workers_go_on(settings: Settings) -> None:
    def reload() -> Settings:
        raise ConfigurationError("IBEX_PORT: it is wrong", hint="Mend it.")

    async with running(settings, reload=reload) as node:
        before = await node.pids()
        with pytest.raises(OperatorError, match="it is wrong") as refused:
            await asyncio.to_thread(request_reload, settings)
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.sleep(0.2)
        assert await node.pids() == before

    assert refused.value.hint == "Mend it."


async def test_a_successor_that_does_not_start_changes_nothing(settings: Settings) -> None:
    broken = settings.model_copy(update={"openai_models": ("broken",)})
    async with running(settings, reload=lambda: broken) as node:
        before = await node.pids()
        with pytest.raises(OperatorError, match=r"the old processes go on\. worker 0: it is broken"):
            await asyncio.to_thread(request_reload, settings)
        assert await node.pids() == before
        victim = next(iter(before))
        os.kill(victim, signal.SIGKILL)  # what falls comes back with the settings that work
        await eventually(lambda: _answered_by_two_but(node, victim))


async def test_a_reload_is_refused_while_postgres_is_away(settings: Settings) -> None:
    async with relayed(settings.postgres_dsn.get_secret_value()) as relay:
        behind_relay = settings.model_copy(update={"postgres_dsn": Secret(relay.dsn)})
        async with running(behind_relay) as node:
            before = await node.pids()
            await relay.stop()
            with pytest.raises(OperatorError, match="Postgres does not answer"):
                await asyncio.to_thread(request_reload, settings)
            assert await node.pids() == before
            await relay.start()
            assert (await asyncio.to_thread(request_reload, settings)).replaced == ["worker 0", "worker 1"]


async def test_settings_that_need_a_full_restart_are_named(settings: Settings) -> None:
    changed = settings.model_copy(update={"workers": 5, "port": 1})
    async with running(settings, reload=lambda: changed):
        result = await asyncio.to_thread(request_reload, settings)

    assert result.ignored_settings == ["port", "workers"]


async def _returns(value: bool) -> bool:
    return value


async def _answered_by_two_but(node: Node, victim: int) -> bool:
    pids = await node.pids()
    return len(pids) == 2 and victim not in pids
