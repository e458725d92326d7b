"""`serve --no-recorder` and `ibexctl recorder`: the two roles of a node apart, on one data directory."""

from typing import Any

import asyncpg
import pytest

from ibex.config import Settings
from ibex.engines.addresses import RUN_FILE
from ibex.engines.embedded import EmbeddedEngines
from ibex.errors import OperatorError, ServerNotRunning
from ibex.sandbox import Sandbox
from ibex.server.lone_recorder import LoneRecorder, LoneRecorderStatus
from tests.conftest import PostgresDatabase, run_clickhouse, settings_of
from tests.server.nodes import eventually
from tests.server.served import ask, run, served, with_upstream

CHAT = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "hello"}]}


async def test_turns_that_one_serves_the_other_delivers(
    settings: Settings, headers: dict[str, str], postgres_database: PostgresDatabase, clickhouse_dsn: str
) -> None:
    connection = await asyncpg.connect(postgres_database.superuser_dsn)

    async def is_delivered(count: int) -> bool:
        traces = int(run_clickhouse(clickhouse_dsn, "select count() from llm_traces"))
        return [count, count] == [traces, await connection.fetchval("select count(*) from ibex_core.checkpoints")]

    async with Sandbox.serve() as sandbox, served(with_upstream(settings, sandbox), "serve", "--no-recorder") as server:
        assert (await ask(server.url, headers, CHAT)).status == 200
        async with served(settings, "recorder") as recorder:
            assert recorder.facts["journal"] == str(settings.journal_dir)
            await eventually(lambda: is_delivered(1))
            assert (await ask(server.url, headers, CHAT)).status == 200
            await eventually(lambda: is_delivered(2))
            shown = (await run(settings, "status"))[1]
            with pytest.raises(OperatorError, match=f"has a recorder already: process {recorder.facts['pid']}"):
                await LoneRecorder(settings, lambda _: None).run()
            assert (await recorder.stop())[0] == 0
        assert (await ask(server.url, headers, CHAT)).status == 200
        assert (await server.stop())[0] == 0
    assert await is_delivered(2)
    await connection.close()

    assert f"delivered by process {recorder.facts['pid']} (`ibexctl recorder`)" in shown


async def test_with_embedded_stores_it_ends_with_the_server_that_runs_them(
    running_engines_session: EmbeddedEngines, data_dir: Any
) -> None:
    with pytest.raises(ServerNotRunning, match="No ibex server is running"):
        await LoneRecorder(settings_of(data_dir), lambda _: None).run()

    directory = running_engines_session.directory
    written = directory.read_run_file(RUN_FILE)
    said: list[LoneRecorderStatus] = []

    def lose_the_server(status: LoneRecorderStatus) -> None:
        said.append(status)
        directory.remove_run_file(RUN_FILE)

    try:
        with pytest.raises(ServerNotRunning, match="has ended whose embedded stores"):
            await LoneRecorder(settings_of(directory.path), lose_the_server).run()
    finally:
        directory.write_run_file(RUN_FILE, written)

    assert said[0].metrics_url is None
