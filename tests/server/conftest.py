"""One worker's whole chain in this process: real sockets, real stores, the sandbox as the upstream."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from ibex.config import Secret, Settings
from ibex.domain.turns import Turn, decode_turn
from ibex.runtime import Worker, clickhouse_migrator, open_worker
from ibex.sandbox import Sandbox
from ibex.server.control import Control
from ibex.server.edge.app import HttpServer
from ibex.stores.journal.segments import HEADER_SIZE, SUFFIX, SegmentReader
from ibex.stores.postgres.directives import DirectiveAdmin
from ibex.stores.postgres.identity_admin import IdentityAdmin
from ibex.stores.postgres.pool import Postgres
from ibex.telemetry import Metrics
from tests.tenants import Tenant, make_tenant


@dataclass
class Edge:
    """A worker that serves, an organization to serve, and what its operators have."""

    worker: Worker
    server: HttpServer
    port: int
    http: aiohttp.ClientSession
    sandbox: Sandbox
    admin: IdentityAdmin
    directives: DirectiveAdmin
    tenant: Tenant
    metrics: Metrics
    body: dict[str, Any] = field(
        default_factory=lambda: {
            "model": "gpt-4o-mini",
            "messages": [{"role": "user", "content": "Reply with exactly: IBEX_OK"}],
        }
    )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def headers(self, **changes: str | None) -> dict[str, str]:
        """What the tenant's agent presents; a header given as None is left out."""
        presented: dict[str, str | None] = {
            "Authorization": f"Bearer {self.tenant.bearer}",
            "X-IBEX-Agent-ID": str(self.tenant.agent_id),
            "Content-Type": "application/json",
            **{name.replace("_", "-"): value for name, value in changes.items()},
        }
        return {name: value for name, value in presented.items() if value is not None}

    async def chat(self, *, sandbox: dict[str, Any] | None = None, **changes: Any) -> tuple[int, dict[str, str], bytes]:
        """Send one chat; status, headers (lower-case) and body. `headers` replaces what is presented."""
        headers = self.headers(**changes.pop("headers", {}))
        data = changes.pop("data", None)
        body = {**self.body, **changes, **({"metadata": {"sandbox": sandbox}} if sandbox else {})}
        payload = json.dumps(body).encode() if data is None else data
        async with self.http.post(f"{self.url}/v1/chat/completions", data=payload, headers=headers) as response:
            content = await response.read()
            return response.status, {name.lower(): value for name, value in response.headers.items()}, content

    async def open_raw(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A bare connection."""
        return await asyncio.open_connection("127.0.0.1", self.port)

    def raw_request(self, body: bytes | None = None, *, headers: str = "", method: str = "POST") -> bytes:
        """A chat request as bytes."""
        payload = json.dumps(self.body).encode() if body is None else body
        fields = "".join(f"{name}: {value}\r\n" for name, value in self.headers().items())
        head = f"{method} /v1/chat/completions HTTP/1.1\r\nHost: ibex\r\n{fields}{headers}"
        return f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload

    def turns(self) -> list[Turn]:
        """What the journal holds, in order."""
        found = []
        for path in sorted(Path(self.worker.settings.journal_dir).rglob(f"*{SUFFIX}")):
            found += [decode_turn(record.payload) for record in SegmentReader(path).read(HEADER_SIZE).records]
        return sorted(found, key=lambda turn: turn.completed_at)

    def last_turn(self) -> Turn:
        """The turn that ended last."""
        return self.turns()[-1]


@pytest.fixture
async def edge(
    data_dir: Path, postgres_database: Any, redis_url: str, request: pytest.FixtureRequest
) -> AsyncIterator[Edge]:
    """A worker on a free port. Settings can be changed by `@pytest.mark.parametrize("edge", [{…}], indirect=True)`."""
    changes = getattr(request, "param", {})
    async with AsyncExitStack() as stack:
        sandbox = await stack.enter_async_context(Sandbox.serve())
        settings = Settings(
            **{
                "data_dir": data_dir,
                "llm_mode": "live",
                "openai_api_key": Secret("sk-of-the-provider"),
                "openai_base_url": sandbox.base_url,
                "provider_retries": 0,
                "rate_limit_rpm": 100_000,
                "access_log": False,
                "postgres_dsn": Secret(postgres_database.dsn),
                "postgres_admin_dsn": Secret(postgres_database.admin_dsn),
                "redis_url": Secret(redis_url),
                "clickhouse_dsn": Secret("http://127.0.0.1:9/nowhere"),
                **changes,
            }
        )
        owner = await Postgres.connect(postgres_database.admin_dsn, name="tests")
        stack.push_async_callback(owner.close)
        admin = IdentityAdmin(owner)
        tenant = await make_tenant(admin, "Tenant")
        metrics = Metrics()
        control = Control(metrics)
        worker = await stack.enter_async_context(open_worker(settings, slot=0, metrics=metrics, neighbours=control))
        server = HttpServer(worker, control)
        sock = socket.create_server(("127.0.0.1", 0))
        await server.start([sock])
        stack.push_async_callback(server.close)
        http = await stack.enter_async_context(aiohttp.ClientSession())
        port = sock.getsockname()[1]
        yield Edge(worker, server, port, http, sandbox, admin, DirectiveAdmin(owner), tenant, metrics)


@pytest.fixture
async def settings(data_dir: Path, postgres_database: Any, redis_url: str, clickhouse_dsn: str) -> Settings:
    """Real addresses for every store, so that a start costs what the workers cost."""
    async with clickhouse_migrator(clickhouse_dsn) as migrator:
        await migrator.up()
    return Settings(
        data_dir=data_dir,
        port=0,
        workers=2,
        shutdown_timeout=10,
        llm_mode="live",
        openai_api_key=Secret("sk-of-the-provider"),
        postgres_dsn=Secret(postgres_database.dsn),
        postgres_admin_dsn=Secret(postgres_database.admin_dsn),
        redis_url=Secret(redis_url),
        clickhouse_dsn=Secret(clickhouse_dsn),
    )


@pytest.fixture
async def headers(postgres_database: Any) -> dict[str, str]:
    """What an agent of a server on `settings` presents."""
    owner = await Postgres.connect(postgres_database.admin_dsn, name="tests")
    try:
        tenant = await make_tenant(IdentityAdmin(owner), "Tenant")
    finally:
        await owner.close()
    return {"Authorization": f"Bearer {tenant.bearer}", "X-IBEX-Agent-ID": str(tenant.agent_id)}


@pytest.fixture
def production(settings: Settings) -> Settings:
    """The same outside development."""
    return settings.model_copy(update={"env": "production", "metrics_port": 0})
