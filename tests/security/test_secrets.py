"""Secrets are planted, every route and failure is driven, and whatever was left behind is searched for them."""

import asyncio
import json

import pytest

from ibex.config import Secret
from ibex.domain.directives import DirectiveMode
from ibex.telemetry import configure_logging
from tests.conftest import PostgresDatabase, run_clickhouse
from tests.security.canaries import (
    DIRECTIVE,
    LOUD,
    PROMPT,
    PROVIDER_KEY,
    Search,
    deliver,
    drive,
    files_content,
    make_search,
    postgres_content,
    redis_content,
)
from tests.server.conftest import Edge
from tests.waiting import eventually


@pytest.mark.parametrize("edge", [LOUD], indirect=True)
async def test_nothing_secret_is_left_anywhere(
    edge: Edge,
    redis_url: str,
    postgres_database: PostgresDatabase,
    clickhouse_dsn: str,
    spans: list[bytes],
    log_lines: None,
    capfd: pytest.CaptureFixture[str],
) -> None:
    configure_logging(edge.worker.settings, "worker 0")
    search = make_search(edge)
    await edge.directives.set(edge.tenant.agent_id, DIRECTIVE, DirectiveMode.SYSTEM_FIRST)

    refusals = await drive(edge)
    kept_answers = redis_content(redis_url)
    await edge.http.close()
    await edge.server.close()
    journal = files_content(edge.worker.settings.data_dir)
    await deliver(edge, postgres_database.dsn, clickhouse_dsn)
    logged = capfd.readouterr().err.encode()
    traces = run_clickhouse(clickhouse_dsn, "SELECT * FROM llm_traces FORMAT JSONEachRow").encode()

    assert search.find("", edge.sandbox.requests[0].body) == ["prompt in ", "directive in "], "nothing was planted"
    assert len(refusals) > 50
    assert logged.count(b'"logger":"ibex.access"') > 50
    assert len(kept_answers) > 500
    assert len(journal) > 1000
    assert traces.count(b"turn_id") > 10
    assert len(b"".join(spans)) > 1000
    found = [
        *search.find("the log", logged),
        *(place for refusal in refusals for place in search.find(f"a refusal: {refusal[:300]!r}", refusal)),
        *search.find("Redis", kept_answers),
        *search.find("the journal", journal),
        *search.find("ClickHouse", traces),
        *search.find("spans", b"".join(spans)),
    ]
    async for table, rows in postgres_content(postgres_database.superuser_dsn):
        found += search.find(table, rows, but=("directive",) if table == "directive_versions" else ())
    assert found == []


@pytest.mark.parametrize("edge", [LOUD], indirect=True)
async def test_a_bug_tells_no_secrets(
    edge: Edge, spans: list[bytes], log_lines: None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure_logging(edge.worker.settings, "worker 0")

    def stumble(model: str) -> None:
        raise LookupError(f"{edge.tenant.bearer} {PROMPT} {PROVIDER_KEY}")

    monkeypatch.setattr(edge.worker.router, "choose", stumble)
    status, headers, content = await edge.chat()
    await edge.server.close()
    logged = capfd.readouterr().err.encode()

    error = json.loads(content)["error"]
    assert (status, error["code"]) == (500, "INTERNAL_ERROR")
    assert headers["x-request-id"].encode() in logged
    assert b"LookupError" in logged
    assert [*make_search(edge).find("the log", logged), *make_search(edge).find("the answer", content)] == []


@pytest.mark.parametrize(
    "edge", [{**LOUD, "redis_url": Secret("redis://:canary-of-redis@127.0.0.1:9/0")}], indirect=True
)
async def test_a_store_that_is_away_is_told_without_its_password(
    edge: Edge, spans: list[bytes], log_lines: None, capfd: pytest.CaptureFixture[str]
) -> None:
    configure_logging(edge.worker.settings, "worker 0")
    search = Search({"password": b"canary-of-redis", **make_search(edge).secrets})

    status, _, content = await edge.chat(headers={"Idempotency_Key": "k"})
    async with edge.http.get(f"{edge.url}/ready") as response:
        ready = await response.read()
    await edge.server.close()

    assert status == 503
    assert b"redis" in ready
    assert search.find("the answer", content + ready) == []
    assert search.find("the log", capfd.readouterr().err.encode()) == []


async def test_what_holds_a_secret_does_not_show_it(edge: Edge) -> None:
    await edge.chat()
    shown = repr(edge.worker.settings) + str(edge.worker.settings) + repr(vars(edge.worker))

    assert "sk-of-the-provider" not in shown
    assert edge.tenant.bearer not in shown


async def test_junk_leaves_the_metrics_as_small_as_before(edge: Edge) -> None:
    async def size() -> int:
        async with edge.http.get(f"{edge.url}/metrics") as response:
            text = await response.text()
        return len([line for line in text.splitlines() if not line.startswith("#")])

    await edge.chat(model="junk-0")
    await edge.chat(model="no-such-model-0")
    await _send_junk(edge, range(1))
    await eventually(lambda: edge.metrics.active_connections.labels().value <= 1)
    await size()
    before = await size()

    places = asyncio.Semaphore(32)

    async def ask(number: int) -> None:
        async with places:
            await edge.chat(model=f"junk-{number}")

    await asyncio.gather(*(ask(number) for number in range(1000)))
    await _send_junk(edge, range(9000))

    assert await size() == before


async def _send_junk(edge: Edge, numbers: range) -> None:
    """Paths, queries and methods nobody has thought of, many at once."""
    methods = ("GET", "PROPFIND", "REPORT", "PURGE")
    reader, writer = await edge.open_raw()
    lines = (f"{methods[n % 4]} /junk/{n}?{n} HTTP/1.1\r\nHost: h{n}\r\nUser-Agent: {n}" for n in (*numbers, *range(4)))
    data = "".join(f"{line}\r\n\r\n" for line in lines).encode()

    async def send() -> None:
        writer.write(data + b"GET /health HTTP/1.1\r\nHost: ibex\r\nConnection: close\r\n\r\n")
        await writer.drain()

    async def read() -> bytes:
        return await reader.read(-1)

    _, received = await asyncio.gather(send(), read())
    assert received.count(b"HTTP/1.1 404") == len(numbers) + 4
    writer.close()
