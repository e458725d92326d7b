"""Two nodes of two workers each that share every store, and a connection to each worker, so that each can be asked.

The first node runs Postgres and ClickHouse for both. Redis is a process of the tests' own, to be stopped, frozen and
emptied, and the provider is one sandbox, whose log says what reached it.
"""

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import aiohttp
import pytest
import redis

from ibex.config import Settings
from ibex.engines.addresses import StoreAddresses, resolve_addresses
from ibex.stores.postgres.identity_admin import IdentityAdmin
from ibex.stores.postgres.pool import Postgres
from tests.acceptance.conftest import House, make_data_dir, remove_data_dir, start_house, stop_house
from tests.tenants import Tenant
from tests.valkey import Valkey, run_valkey

PROBE = "/v1/internal/auth-probe"
CHAT = "/v1/chat/completions"
WITHOUT_SCRIPTS = "unscripted"
"""The Redis user of the second node: it may run a script's text, and neither load nor name one."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of a worker."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str | None:
        """The error's code."""
        return json.loads(self.body)["error"]["code"] if self.status >= 400 else None


class Line:
    """A connection to a node, kept open; given a `pid`, opened until it is this worker who takes it."""

    def __init__(self, url: str, pid: int | None = None, *, source: str = "127.0.0.1") -> None:
        self._address = urlsplit(url)
        self._source = source
        self.pid = pid
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, tenant: Tenant, path: str = PROBE, *, key: str | None = None, **body: Any) -> Answer:
        """Ask as the tenant's agent; a chat when `path` says so, with these fields of the body changed."""
        headers = {"Authorization": f"Bearer {tenant.bearer}", "X-IBEX-Agent-ID": str(tenant.agent_id)}
        if key is not None:
            headers["Idempotency-Key"] = key
        return await self.send(path, headers, make_chat(**body) if path == CHAT else None)

    async def send(self, path: str, headers: dict[str, str], payload: bytes | None = None) -> Answer:
        """Send one request and read its answer; a POST when there is a payload."""
        if self._streams is None:
            self._streams = await self._connect()
        reader, writer = self._streams
        if payload is not None:
            headers = headers | {"Content-Type": "application/json", "Content-Length": str(len(payload))}
        fields = "".join(f"{name}: {value}\r\n" for name, value in {"Host": "ibex", **headers}.items())
        writer.write(f"{'GET' if payload is None else 'POST'} {path} HTTP/1.1\r\n{fields}\r\n".encode())
        writer.write(payload or b"")
        try:
            answer = await _read_answer(reader)
        except BaseException:
            self.close()
            raise
        if answer.headers.get("connection") == "close":
            self.close()
        return answer

    def close(self) -> None:
        """Hang up."""
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while True:
            reader, writer = await asyncio.open_connection(
                self._address.hostname, self._address.port, local_addr=(self._source, 0)
            )
            if self.pid is None:
                return reader, writer
            writer.write(b"GET /health HTTP/1.1\r\nHost: ibex\r\n\r\n")
            await _read_answer(reader)
            if _owns_far_end(self.pid, writer.get_extra_info("sockname")[1]):
                return reader, writer
            writer.transport.abort()


async def _read_answer(reader: asyncio.StreamReader) -> Answer:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    line, *fields = head.rstrip().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)}
    return Answer(int(line.split(" ")[1]), headers, await reader.readexactly(int(headers["content-length"])))


def _owns_far_end(pid: int, port: int) -> bool:
    """Whether a process holds the server's side of the connection from this port of this machine.

    All workers of a node accept on the same address, and no answer says which of them gave it.
    """
    rows = (row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:])
    inodes = {f"socket:[{row[9]}]" for row in rows if int(row[2].rpartition(":")[2], 16) == port}
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if str(descriptor.readlink()) in inodes:
                return True
    return False


def make_chat(**changes: Any) -> bytes:
    """A chat's body."""
    message = {"role": "user", "content": "Reply with exactly: IBEX_OK"}
    return json.dumps({"model": "gpt-4o-mini", "messages": [message], **changes}).encode()


@dataclass(frozen=True)
class Nodes:
    """The two nodes, and what they share."""

    houses: tuple[House, House]
    addresses: StoreAddresses
    valkey: Valkey
    upstream: str
    """The sandbox's base URL."""
    settings: dict[str, str]
    """The second node's, which owns no store."""

    @property
    def redis_url(self) -> str:
        """As the first node's user, who may do everything."""
        return self.valkey.url

    @asynccontextmanager
    async def lines(self) -> AsyncIterator[list[Line]]:
        """A connection to each worker: the first node's two, then the second's."""
        lines = [Line(house.url, pid) for house in self.houses for pid in worker_pids(house)]
        assert len(lines) == 4
        try:
            yield lines
        finally:
            for line in lines:
                line.close()

    @asynccontextmanager
    async def connections(self, count: int) -> AsyncIterator[list[Line]]:
        """So many connections to whichever workers take them, in turn at the one node and the other."""
        lines = [Line(self.houses[number % 2].url) for number in range(count)]
        try:
            yield lines
        finally:
            for line in lines:
                line.close()

    @contextlib.contextmanager
    def another(self, **settings: str) -> Iterator[House]:
        """A third node, of one worker, with these settings changed."""
        with contextlib.ExitStack() as stack:
            yield _start(stack, **self.settings | {"IBEX_WORKERS": "1"} | settings)

    @asynccontextmanager
    async def admin(self) -> AsyncIterator[IdentityAdmin]:
        """What operators change identity with; it commits and does not publish."""
        owner = await Postgres.connect(self.addresses.postgres_admin, name="tests")
        try:
            yield IdentityAdmin(owner)
        finally:
            await owner.close()

    async def upstream_requests(self, marker: str) -> list[dict[str, Any]]:
        """The requests that reached the provider with this text in their body."""
        async with aiohttp.ClientSession() as http, http.get(self.upstream[:-3] + "/_sandbox/requests") as response:
            return [entry for entry in (await response.json())["requests"] if marker in entry["body"]]

    def flush(self) -> None:
        """Empty Redis."""
        with contextlib.closing(redis.from_url(self.redis_url)) as client:
            client.flushall()

    async def settle(self) -> None:
        """Return when every store is there again."""
        async with asyncio.timeout(60):
            for house in self.houses:
                while await _is_degraded(house.url):  # noqa: ASYNC110 - it happens elsewhere
                    await asyncio.sleep(0.1)


async def _is_degraded(url: str) -> bool:
    async with aiohttp.ClientSession() as http:
        for _ in range(8):  # of two workers, one of which may still be degraded
            async with http.get(f"{url}/ready", headers={"Connection": "close"}) as response:
                if (await response.json())["status"] != "ok":
                    return True
    return False


def worker_pids(house: House) -> list[int]:
    """The workers that live, by the supervisor's children: quicker than asking it by the command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == house.process.pid and (process / "cmdline").read_bytes().startswith(b"ibex: worker"):
                found.append(int(process.name))
    return sorted(found)


class Upstream:
    """The sandbox in a process of its own, in nobody's event loop."""

    def __init__(self, base_url: str, process: "subprocess.Popen[str]") -> None:
        self.base_url = base_url
        self._process = process

    @classmethod
    def start(cls) -> Self:
        """Start it on a free port."""
        process = subprocess.Popen([sys.executable, "-m", "ibex.sandbox"], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        return cls(process.stdout.readline().split()[-1], process)

    def stop(self) -> None:
        """Stop it."""
        self._process.terminate()
        self._process.communicate(timeout=20)


@contextlib.contextmanager
def run_nodes() -> Iterator[Nodes]:
    """Start everything, and stop it again."""
    with contextlib.ExitStack() as stack:
        acl = f"user {WITHOUT_SCRIPTS} on nopass ~* &* +@all -evalsha -evalsha_ro -script".split()
        valkey = stack.enter_context(run_valkey("--" + acl[0], *acl[1:], "--rdbcompression", "no"))
        upstream = Upstream.start()
        stack.callback(upstream.stop)
        shared = {
            "IBEX_LLM_MODE": "live",
            "OPENAI_API_KEY": "sk-of-the-provider",
            "OPENAI_BASE_URL": upstream.base_url,
            "IBEX_WORKERS": "2",
            "IBEX_REDIS_DEADLINE_MS": "250",  # so that a busy machine fails no test that is about counting
        }
        first = _start(stack, IBEX_REDIS_URL=valkey.url, **shared)
        data_dir = Path(first.environ["IBEX_DATA_DIR"])
        addresses = resolve_addresses(Settings(data_dir=data_dir, redis_url=valkey.url))
        guest = shared | {
            "IBEX_REDIS_URL": valkey.url.replace("unix://", f"unix://{WITHOUT_SCRIPTS}:any@"),
            "IBEX_POSTGRES_DSN": addresses.postgres,
            "IBEX_POSTGRES_ADMIN_DSN": addresses.postgres_admin,
            "IBEX_CLICKHOUSE_DSN": addresses.clickhouse,
        }
        second = _start(stack, **guest)
        yield Nodes((first, second), addresses, valkey, upstream.base_url, guest)


def _start(stack: contextlib.ExitStack, **settings: str) -> House:
    data_dir = make_data_dir()
    stack.callback(remove_data_dir, data_dir)
    house = start_house(data_dir, **settings)
    stack.callback(_stop, house)
    return house


def _stop(house: House) -> None:
    try:
        assert stop_house(house) == 0
    finally:
        if house.process.poll() is None:
            house.process.kill()


@pytest.fixture(scope="session")
def running_nodes() -> Iterator[Nodes]:
    """The two nodes, running until the session's end."""
    with run_nodes() as nodes:
        yield nodes


@pytest.fixture
async def nodes(running_nodes: Nodes) -> Nodes:
    """The two nodes, with all that they need."""
    await running_nodes.settle()
    return running_nodes
