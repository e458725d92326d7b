"""Secrets are planted, every route and failure is driven, and whatever was left behind is searched for them."""

import asyncio
import json
import logging
import os
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
import redis

from ibex.config import Secret
from ibex.domain.directives import DirectiveMode
from ibex.recorder import Recorder
from ibex.stores.clickhouse import TraceStore
from ibex.stores.clickhouse_schema import ClickHouseSchema
from ibex.stores.migrations import Migrator, find_migrations
from ibex.stores.postgres import Postgres
from ibex.stores.sessions import SessionStore
from ibex.telemetry import Metrics, configure_logging
from ibexctl import app as ibexctl
from tests.conftest import PostgresDatabase, run_clickhouse
from tests.security.http.raw_client import Connection
from tests.server.conftest import Edge
from tests.waiting import eventually

PROVIDER_KEY = "sk-canary-of-the-provider"
PROMPT = "canary of a prompt"
DIRECTIVE = "canary of a directive"


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


COLLECTOR_PORT = _free_port()

LOUD = {
    "openai_api_key": Secret(PROVIDER_KEY),
    "access_log": True,
    "log_level": "debug",
    "log_format": "json",
    "otel_endpoint": f"http://127.0.0.1:{COLLECTOR_PORT}/v1/traces",
    "otel_sample_ratio": 1.0,
    "head_seconds": 0.2,
    "body_seconds": 0.3,
    "provider_idle_seconds": 0.3,
}


@pytest.fixture
def log_lines(capfd: pytest.CaptureFixture[str], request: pytest.FixtureRequest) -> Iterator[None]:
    """Log as a worker does, at debug level, into what `capfd` reads."""
    root = logging.getLogger()
    before = (root.handlers[:], root.level, {name: logging.getLogger(name).level for name in _loggers()})
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    for name, level in before[2].items():
        logging.getLogger(name).setLevel(level)


def _loggers() -> tuple[str, ...]:
    return ("ibex", "aiohttp.access", "aiohttp.server", "asyncio")


@pytest.fixture
def spans() -> Iterator[list[bytes]]:
    """What a collector of spans is sent."""
    received: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", COLLECTOR_PORT), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield received
    server.shutdown()
    server.server_close()


@dataclass
class Search:
    """Looks for the canaries, and says where it found which."""

    secrets: dict[str, bytes]

    def find(self, place: str, data: bytes, *, but: tuple[str, ...] = ()) -> list[str]:
        """Also in the spellings stores use for bytes."""
        return [
            f"{name} in {place}"
            for name, secret in self.secrets.items()
            if name not in but and any(form in data for form in (secret, secret.hex().encode()))
        ]


def _search(edge: Edge) -> Search:
    return Search(
        {
            "token": edge.tenant.bearer.split("_", 3)[3].encode(),
            "provider key": PROVIDER_KEY.encode(),
            "prompt": PROMPT.encode(),
            "directive": DIRECTIVE.encode(),
        }
    )


async def _drive(edge: Edge) -> list[bytes]:
    """Every route and failure there is; the bodies and heads of all refusals."""
    edge.body["messages"][0]["content"] = f"Reply with exactly: {PROMPT}"
    leak = {"message": f"Incorrect key {PROVIDER_KEY}; you said {DIRECTIVE}", "type": "x", "code": "y"}
    refusals: list[bytes] = []

    async def chat(**options: Any) -> None:
        status, headers, content = await edge.chat(**options)
        if status >= 400:
            refusals.extend((json.dumps(headers).encode(), content))

    for stream in (False, True):
        for _ in range(2):
            await chat(stream=stream, headers={"Idempotency_Key": f"k-{stream}", "X_IBEX_Session_ID": "s"})
        for status in (400, 401, 404, 422, 429, 500):
            await chat(stream=stream, sandbox={"status": status, "error": leak})
        await chat(stream=stream, sandbox={"cut_after": -1})
        await chat(stream=stream, sandbox={"body": "not JSON"})
    await chat(headers={"Idempotency_Key": "k-False"}, temperature=0)
    await chat(sandbox={"hang_after": 3})
    for headers in (
        {"Authorization": None},
        {"Authorization": f"Basic {edge.tenant.bearer}"},
        {"Authorization": f"Bearer {edge.tenant.bearer}x"},
        {"X_IBEX_Agent_ID": None},
        {"X_IBEX_Agent_ID": edge.tenant.bearer},
        {"X_IBEX_Agent_ID": str(uuid4())},
        {"X_IBEX_Session_ID": f"{PROMPT} "},
        {"X_IBEX_Session_ID": edge.tenant.bearer.replace("_", "/")},
        {"Content_Type": PROMPT},
    ):
        await chat(headers=headers)
    for data in (f'{{"{PROMPT}', f'{{"model":"{PROMPT}"}}', f'"{PROMPT}"', "[" * 500 + PROMPT):
        await chat(data=data.encode())
    refusals += await _ask_elsewhere(edge)
    refusals += await _send_raw(edge)
    return refusals


async def _ask_elsewhere(edge: Edge) -> list[bytes]:
    """The other routes, with and without rights."""
    bodies = []
    paths = (
        "/health",
        "/ready",
        "/metrics",
        "/v1/models",
        f"/v1/models/{PROMPT}",
        "/v1/internal/auth-probe",
        "/nowhere",
    )
    for path in (*paths, f"/v1/orgs/{edge.tenant.org_id}/auth-probe", f"/v1/orgs/{uuid4()}/auth-probe", f"/{PROMPT}"):
        for method in ("GET", "DELETE"):
            async with edge.http.request(method, edge.url + path, headers=edge.headers()) as response:
                bodies.append(await response.read())
    return [body for body in bodies if f"There is no model `{PROMPT}`".encode() not in body]


async def _send_raw(edge: Edge) -> list[bytes]:
    """What is no HTTP, or too much, or too slow; and clients that leave."""
    whole = edge.raw_request()
    token = f"Authorization: Bearer {edge.tenant.bearer}\r\n"
    stream = json.dumps({**edge.body, "stream": True, "metadata": {"sandbox": {"events": 1000, "gap_ms": 20}}}).encode()
    found = []
    for data, leaves in (
        (f"{token}\r\n".encode() + whole, False),
        (f"GET /{PROVIDER_KEY} HTTP/9.9\r\n{token}\r\n".encode(), False),
        (f"GET /health HTTP/1.1\r\nHost: {edge.tenant.bearer}@x\r\n{token}\r\n".encode(), False),
        (f"GET /health HTTP/1.1\r\nHost: ibex\r\n{token}X: {'y' * 40_000}\r\n\r\n".encode(), False),
        (f"GET /health HTTP/1.1\r\nHost: ibex\r\n{token}{token}\r\n".encode(), False),
        (f"GET /health HTTP/1.1\r\nHost: ibex\r\n{token}\x00: {PROMPT}\r\n\r\n".encode(), False),
        (f"GET /health HTTP/1.1\r\nHost: ibex\r\n{token}".encode(), False),
        (whole[:-4], False),
        (whole[:-4], True),
        (whole.replace(b"Content-Length", b"Transfer-Encoding: chunked\r\nX"), False),
        (edge.raw_request(stream), True),
    ):
        connection = await Connection.open(edge.port)
        connection.writer.write(data)
        if leaves:
            await asyncio.sleep(0.1)
        while not leaves and await connection.read_on():
            pass
        connection.close()
        found.append(bytes(connection.received) if not leaves else b"")
    return found


async def _deliver(edge: Edge, postgres: str, clickhouse: str) -> None:
    """Give the journal to a recorder until both stores have it."""
    schema = ClickHouseSchema(clickhouse)
    await Migrator(schema, find_migrations("clickhouse")).up()
    await schema.close()
    pool, traces = await Postgres.connect(postgres, name="recorder"), await TraceStore.connect(clickhouse)
    recorder = Recorder(
        edge.worker.settings,
        journal_dir=edge.worker.settings.journal_dir,
        sessions=SessionStore(pool),
        traces=traces,
        metrics=Metrics(),
        prune=_prune_nothing,
    )
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(recorder.run(stop))
        await asyncio.sleep(0)
        stop.set()
    await traces.close()
    await pool.close()


async def _prune_nothing() -> int:
    return 0


def _files_content(directory: Path) -> bytes:
    """Every file of the data directory; the journal's among them."""
    return b"".join(path.read_bytes() for path in directory.rglob("*") if path.is_file())


def _redis_content(url: str) -> bytes:
    """Names and values of every key."""
    with redis.from_url(url) as client:
        found = []
        for key in client.scan_iter(count=1000):
            kind = client.type(key)
            read = {b"string": client.get, b"hash": client.hgetall, b"zset": lambda name: client.zrange(name, 0, -1)}
            found.append(repr((key, read[kind](key) if kind in read else client.lrange(key, 0, -1))).encode())
        return b"\n".join(found)


async def _postgres_content(dsn: str) -> AsyncIterator[tuple[str, bytes]]:
    """Every row of every table, as text."""
    connection = await asyncpg.connect(dsn)
    try:
        tables = await connection.fetch("select tablename from pg_tables where schemaname = 'ibex_core'")
        for (table,) in tables:
            rows = await connection.fetch(f"select t::text from ibex_core.{table} t")
            yield table, "\n".join(row[0] for row in rows).encode()
    finally:
        await connection.close()


@pytest.fixture
def ctl(
    edge: Edge,
    postgres_database: PostgresDatabase,
    redis_url: str,
    clickhouse_dsn: str,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Awaitable[int]]:
    """Runs `ibexctl` in this process, as an operator whose environment holds every secret; its exit code."""
    environ = {
        "IBEX_ENV_FILE": os.devnull,
        "IBEX_DATA_DIR": str(edge.worker.settings.data_dir),
        "IBEX_POSTGRES_DSN": postgres_database.dsn,
        "IBEX_POSTGRES_ADMIN_DSN": postgres_database.admin_dsn,
        "IBEX_REDIS_URL": redis_url,
        "IBEX_CLICKHOUSE_DSN": clickhouse_dsn,
        "IBEX_LOG_LEVEL": "debug",
        "OPENAI_API_KEY": PROVIDER_KEY,
        "OPENAI_BASE_URL": edge.sandbox.base_url,
    }
    for name, value in environ.items():
        monkeypatch.setenv(name, value)

    async def run_command(*words: object) -> int:
        return await asyncio.to_thread(ibexctl.run, [str(word) for word in words])

    return run_command


def _commands(edge: Edge, trace: str) -> list[tuple[object, ...]]:
    """Every command that shows what is stored or set; a directive's text is shown by two others, on demand."""
    agent = edge.tenant.agent_id
    return [
        ("config", "show"),
        ("config", "show", "--origin"),
        ("config", "check"),
        ("migrate", "status"),
        ("org", "list"),
        ("org", "show", edge.tenant.org_id),
        ("user", "list"),
        ("agent", "list"),
        ("agent", "show", agent),
        ("token", "list"),
        ("token", "list", "--all"),
        ("directive", "history", agent),
        ("session", "list"),
        ("session", "show", "s", "--agent", agent),
        ("trace", "list"),
        ("trace", "show", trace),
        ("trace", "stats", "--by", "model"),
        ("audit", "list"),
        ("journal", "status"),
        ("journal", "dead-letters", "list"),
        ("reconcile", "--settle", "1s"),
    ]


@pytest.mark.parametrize("edge", [LOUD], indirect=True)
async def test_the_command_line_shows_no_secrets(
    edge: Edge,
    postgres_database: PostgresDatabase,
    clickhouse_dsn: str,
    spans: list[bytes],
    log_lines: None,
    ctl: Callable[..., Awaitable[int]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """What is minted and set through it is searched for too; so is what it says of a mistake, and what it audits."""
    search = _search(edge)
    agent, org = edge.tenant.agent_id, edge.tenant.org_id
    assert await ctl("directive", "set", agent, "--text", DIRECTIVE) == 0
    for name, words in (("minted", ("mint", "--org", org)), ("rotated", ("rotate", edge.tenant.token_id))):
        capfd.readouterr()
        assert await ctl("token", *words, "--json") == 0
        search.secrets[name] = json.loads(capfd.readouterr().out)["token"].split("_", 3)[3].encode()
    await _drive(edge)
    await edge.http.close()
    await edge.server.close()
    await _deliver(edge, postgres_database.dsn, clickhouse_dsn)
    capfd.readouterr()
    assert await ctl("trace", "list", "--json") == 0
    trace = json.loads(capfd.readouterr().out)["traces"][0]["turn_id"]

    found = []
    for_people_and_programs = ((), ("--json",))
    for words in _commands(edge, trace):
        for flags in for_people_and_programs:
            code = await ctl(*words, *flags)
            shown = capfd.readouterr()
            assert (code, bool(shown.out)) == (0, True), (words, shown)
            found += search.find(f"{words} {flags}", (shown.out + shown.err).encode())
    for secret in (edge.tenant.bearer, f"{edge.tenant.bearer}x"):  # where an id belongs
        for words in (("token", "revoke", secret), ("agent", "show", secret), ("org", "show", secret)):
            for flags in for_people_and_programs:
                await ctl(*words, *flags)
                shown = capfd.readouterr()
                assert shown.out or shown.err, words
                found += search.find(f"the mistake {words[:2]} {flags}", (shown.out + shown.err).encode())
    async for table, rows in _postgres_content(postgres_database.superuser_dsn):
        if table == "audit_events":
            assert [rows.count(action) for action in (b"mint", b"rotate", b"set")] >= [1, 1, 1]
            found += search.find(table, rows)
    assert found == []


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
    search = _search(edge)
    await edge.directives.set(edge.tenant.agent_id, DIRECTIVE, DirectiveMode.SYSTEM_FIRST)

    refusals = await _drive(edge)
    kept_answers = _redis_content(redis_url)
    await edge.http.close()
    await edge.server.close()
    journal = _files_content(edge.worker.settings.data_dir)
    await _deliver(edge, postgres_database.dsn, clickhouse_dsn)
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
    async for table, rows in _postgres_content(postgres_database.superuser_dsn):
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
    assert [*_search(edge).find("the log", logged), *_search(edge).find("the answer", content)] == []


@pytest.mark.parametrize(
    "edge", [{**LOUD, "redis_url": Secret("redis://:canary-of-redis@127.0.0.1:9/0")}], indirect=True
)
async def test_a_store_that_is_away_is_told_without_its_password(
    edge: Edge, spans: list[bytes], log_lines: None, capfd: pytest.CaptureFixture[str]
) -> None:
    configure_logging(edge.worker.settings, "worker 0")
    search = Search({"password": b"canary-of-redis", **_search(edge).secrets})

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
