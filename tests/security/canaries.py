"""Secrets that are planted, everything that is driven with them, and how what was left behind is searched."""

import asyncio
import json
import logging
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
import redis

from ibex.config import Secret
from ibex.recorder import Recorder
from ibex.stores.clickhouse.schema import ClickHouseSchema
from ibex.stores.clickhouse.traces import TraceStore
from ibex.stores.migrations import Migrator, find_migrations
from ibex.stores.postgres.pool import Postgres
from ibex.stores.postgres.sessions import SessionStore
from ibex.telemetry import Metrics
from tests.security.http.raw_client import Connection
from tests.server.conftest import Edge

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


def make_search(edge: Edge) -> Search:
    """A search for all that the drive plants."""
    return Search(
        {
            "token": edge.tenant.bearer.split("_", 3)[3].encode(),
            "provider key": PROVIDER_KEY.encode(),
            "prompt": PROMPT.encode(),
            "directive": DIRECTIVE.encode(),
        }
    )


async def drive(edge: Edge) -> list[bytes]:
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


async def deliver(edge: Edge, postgres: str, clickhouse: str) -> None:
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


def files_content(directory: Path) -> bytes:
    """Every file of the data directory; the journal's among them."""
    return b"".join(path.read_bytes() for path in directory.rglob("*") if path.is_file())


def redis_content(url: str) -> bytes:
    """Names and values of every key."""
    with redis.from_url(url) as client:
        found = []
        for key in client.scan_iter(count=1000):
            kind = client.type(key)
            read = {b"string": client.get, b"hash": client.hgetall, b"zset": lambda name: client.zrange(name, 0, -1)}
            found.append(repr((key, read[kind](key) if kind in read else client.lrange(key, 0, -1))).encode())
        return b"\n".join(found)


async def postgres_content(dsn: str) -> AsyncIterator[tuple[str, bytes]]:
    """Every row of every table, as text."""
    connection = await asyncpg.connect(dsn)
    try:
        tables = await connection.fetch("select tablename from pg_tables where schemaname = 'ibex_core'")
        for (table,) in tables:
            rows = await connection.fetch(f"select t::text from ibex_core.{table} t")
            yield table, "\n".join(row[0] for row in rows).encode()
    finally:
        await connection.close()
