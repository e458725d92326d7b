"""SIGTERM while replies are under way: they end as they would have, and what does not is told."""

import asyncio
import json
from typing import Any

import asyncpg

from ibex.config import Secret, Settings
from ibex.recorder.survey import survey_journal
from ibex.sandbox import Sandbox
from tests.conftest import PostgresDatabase, run_clickhouse
from tests.server.served import ask, served, with_upstream
from tests.telemetry.otlp import attributes, http_receiver

STREAMS = 200


def a_stream(**controls: Any) -> dict[str, Any]:
    """A request whose reply passes as it is: the usage was asked for."""
    return {
        "model": "gpt-4o-mini",
        "messages": [{"role": "user", "content": "On and on"}],
        "metadata": {"sandbox": json.dumps(controls)},
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def test_200_open_streams_end_byte_for_byte_as_without_the_stop(
    settings: Settings, headers: dict[str, str], postgres_database: PostgresDatabase, clickhouse_dsn: str
) -> None:
    body = a_stream(events=16, gap_ms=150)
    async with Sandbox.serve() as sandbox:
        expected = (await ask(sandbox.base_url, {}, body)).lasting_events
        async with served(with_upstream(settings, sandbox)) as server:
            began = [asyncio.Event() for _ in range(STREAMS)]
            async with asyncio.TaskGroup() as tasks:
                streams = [tasks.create_task(ask(server.url, headers, body, event)) for event in began]
                for event in began:
                    await event.wait()
                is_over = [stream.done() for stream in streams]
                code, errors = await server.stop()
    replies = [stream.result() for stream in streams]
    connection = await asyncpg.connect(postgres_database.superuser_dsn)
    checkpoints = await connection.fetchval("select count(*) from ibex_core.checkpoints where is_complete")
    await connection.close()
    traces = run_clickhouse(clickhouse_dsn, "select count() from llm_traces where outcome = 'ok'")

    assert expected.endswith(b"data: [DONE]\n\n")
    assert is_over.count(True) == 0
    assert {reply.status for reply in replies} == {200}
    assert {reply.lasting_events for reply in replies} == {expected}
    assert (code, errors.splitlines()[-1].endswith("nothing was cut.")) == (0, True), errors
    assert (checkpoints, int(traces)) == (STREAMS, STREAMS)
    assert not any(backlog.turns for backlog in survey_journal(settings).pending.values())


async def test_what_cannot_end_in_time_is_cut_and_the_server_says_so(
    settings: Settings, headers: dict[str, str], postgres_database: PostgresDatabase
) -> None:
    changes = {"shutdown_timeout": 0.5, "workers": 1, "clickhouse_dsn": Secret("http://127.0.0.1:9/nowhere")}
    async with Sandbox.serve() as sandbox:
        with http_receiver() as receiver:
            traced = {"otel_endpoint": receiver.endpoint, "otel_sample_ratio": 1.0}
            hasty = with_upstream(settings, sandbox).model_copy(update={**changes, **traced})
            async with served(hasty) as server, asyncio.TaskGroup() as tasks:
                began = [asyncio.Event() for _ in range(3)]
                body = a_stream(hang_after=2)
                endless = [tasks.create_task(ask(server.url, headers, body, event)) for event in began]
                for event in began:
                    await event.wait()
                code, errors = await server.stop()
    *_, error, cut, journal = errors.splitlines()
    connection = await asyncpg.connect(postgres_database.superuser_dsn)
    checkpoints = await connection.fetch("select status, is_complete from ibex_core.checkpoints")
    await connection.close()

    assert code == 1
    assert error.startswith("error: Stopped after ")
    assert error.endswith(" s, and cut what was not finished, at the end of IBEX_SHUTDOWN_TIMEOUT:")
    assert cut.strip() == "worker 0: 3 streams"
    assert journal == "The journal keeps 3 turns for the next start to deliver."
    statuses = [attributes(span).get("http.response.status_code") for span in receiver.spans]
    assert statuses.count(200) == 3, "the last spans leave before the worker does"
    assert [tuple(row) for row in checkpoints] == [("incomplete", False)] * 3
    assert all(b'"code":"SERVICE_DEGRADED"' in stream.result().wire for stream in endless)
    assert not any(stream.result().wire.endswith(b"0\r\n\r\n") for stream in endless)
