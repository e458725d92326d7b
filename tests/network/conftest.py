"""Two nodes on machines of their own, the stores and the provider on others, and clients that reach the nodes alone."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import aiohttp
import pytest

from ibex.config import Settings
from ibex.engines.addresses import resolve_addresses
from ibex.stores.postgres.identity_admin import IdentityAdmin
from ibex.stores.postgres.pool import Postgres
from tests.conftest import remove_data_dir
from tests.network.wiring import CLICKHOUSE, POSTGRES, PROVIDER, REDIS, Machine, Network, why_not
from tests.tenants import Tenant, make_tenant

PORT = 8080
PROVIDER_PORT = 9999
PROVIDER_URL = f"http://{PROVIDER}:{PROVIDER_PORT}/v1"
STOP_SECONDS = 40
HEARD_SECONDS = 5.0
"""Contract: how long after a revocation a token may still be served, whatever is cut."""


@dataclass
class Node:
    """`ibexctl serve` on a machine of its own, with a disk of its own."""

    machine: Machine
    environ: dict[str, str]
    process: "subprocess.Popen[str] | None" = None

    @property
    def url(self) -> str:
        """Where clients reach it."""
        return f"http://{self.machine.front}:{PORT}"

    @property
    def data_dir(self) -> Path:
        """Its disk."""
        return Path(self.environ["IBEX_DATA_DIR"])

    def start(self) -> None:
        """Start it, and return when it says that it serves."""
        self.process, _ = self._spawn("serve")

    def ctl(self, *arguments: str, within: float = 0.0) -> Any:
        """What `ibexctl … --json` says on that machine; asked again for so many seconds when it fails."""
        command = [*self.machine.prefix, sys.executable, "-m", "ibexctl", *arguments, "--json"]
        deadline = time.monotonic() + within
        while True:
            done = subprocess.run(command, env=self.environ, capture_output=True, text=True, timeout=60)
            if done.returncode == 0:
                return json.loads(done.stdout)
            assert time.monotonic() < deadline, done.stdout + done.stderr

    def kill(self) -> None:
        """End every process of the machine at once."""
        for pid in self.machine.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        self._bury()

    def stop(self) -> None:
        """SIGTERM; it must end well."""
        if self.process is not None:
            self.process.terminate()
            assert self._bury() == 0, (self.data_dir / "server.log").read_text()

    def _spawn(self, *arguments: str) -> "tuple[subprocess.Popen[str], Any]":
        with (self.data_dir / "server.log").open("a") as log:
            process = subprocess.Popen(
                [*self.machine.prefix, sys.executable, "-m", "ibexctl", *arguments, "--json"],
                env=self.environ, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
            )  # fmt: skip
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, (self.data_dir / "server.log").read_text()
        return process, json.loads(line)

    def _bury(self) -> int:
        assert self.process is not None
        code = self.process.wait(STOP_SECONDS)
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.process = None
        return code


@dataclass
class Cluster:
    """The nodes `a` and `b`, what they share, and who calls."""

    network: Network
    stores: dict[str, str]
    """The DSNs as the nodes reach the stores."""
    disk: Path
    a: Node
    b: Node

    def make_node(self, name: str) -> Node:
        """A node on one more machine, not yet started."""
        return _make_node(self.network.add(name), self.disk / name, self.stores)

    @asynccontextmanager
    async def owner(self) -> AsyncIterator[Postgres]:
        """Postgres as its owner, by its socket, which no cut reaches."""
        dsn = resolve_addresses(Settings(data_dir=self.disk / "stores" / "data"), {"postgres_admin"}).postgres_admin
        postgres = await Postgres.connect(dsn, name="tests")
        try:
            yield postgres
        finally:
            await postgres.close()

    async def make_tenant(self, name: str) -> Tenant:
        """An organization of one test."""
        async with self.owner() as owner:
            return await make_tenant(IdentityAdmin(owner), name)

    async def checkpoints(self, tenant: Tenant) -> list[tuple[int, UUID]]:
        """Index and turn of each checkpoint of an organization, in the order of its sessions."""
        statement = "select turn_index, turn_id from ibex_core.checkpoints where org_id = $1 order by 1"
        async with self.owner() as owner, owner.transaction(org_ids=[tenant.org_id]) as connection:
            return [(row[0], row[1]) for row in await connection.fetch(statement, tenant.org_id)]

    def traces(self, tenant: Tenant) -> list[UUID]:
        """The turns of an organization in ClickHouse, as often as they are there."""
        listed = self.b.ctl("trace", "list", "--org", str(tenant.org_id), "--limit", "10000", within=20)
        return [UUID(trace["turn_id"]) for trace in listed["traces"]]

    @asynccontextmanager
    async def client(self) -> AsyncIterator[aiohttp.ClientSession]:
        """A client in the world: it reaches the nodes and the provider, and no store."""
        connector = aiohttp.TCPConnector(socket_factory=self.network.world.open_socket)
        patience = aiohttp.ClientTimeout(total=30)
        async with aiohttp.ClientSession(connector=connector, timeout=patience) as session:
            yield session


def _make_node(machine: Machine, disk: Path, stores: dict[str, str]) -> Node:
    disk.mkdir(mode=0o700)
    settings = {
        "IBEX_ENV": "staging",  # development would listen on loopback only
        "IBEX_HOST": machine.front,
        "IBEX_PORT": str(PORT),
        "IBEX_ALLOW_PUBLIC_BIND": "true",
        "IBEX_WORKERS": "1",
        "IBEX_DATA_DIR": str(disk),
        "IBEX_ENV_FILE": os.devnull,
        "IBEX_LLM_MODE": "live",
        "IBEX_RATE_LIMIT_RPM": "100000",
        "IBEX_REDIS_DEADLINE_MS": "250",  # of a busy machine
        "OPENAI_API_KEY": "sk-of-the-provider",
        "OPENAI_BASE_URL": PROVIDER_URL,
    }
    return Node(machine, _outside() | settings | stores)


def _outside() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("IBEX_", "OPENAI_"))}


@contextlib.contextmanager
def _program(machine: Machine, *arguments: str) -> Iterator[str]:
    """A Python program that says a line when it serves, and ends with its input or by SIGTERM."""
    command = [*machine.prefix, sys.executable, "-m", *arguments]
    process = subprocess.Popen(command, env=_outside(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, f"{arguments[0]} did not start"
        yield line
    finally:
        process.stdin.close()
        if arguments[0] == "ibex.sandbox":
            process.terminate()
        process.wait(STOP_SECONDS)
        process.stdout.close()


@contextlib.contextmanager
def _cluster() -> Iterator[Cluster]:
    with contextlib.ExitStack() as stack:
        disk = Path(tempfile.mkdtemp(prefix="ibex-net-"))
        stack.callback(remove_data_dir, disk)
        (disk / "stores").mkdir()
        for directory in (disk, disk / "stores"):
            directory.chmod(0o711)  # PostgreSQL, which runs as nobody, reads a file of the stores
        stack.callback(remove_data_dir, disk / "stores" / "data")
        network = Network()
        stack.callback(network.close)
        where = (str(disk / "stores"), POSTGRES, REDIS, CLICKHOUSE)
        sandbox = ("ibex.sandbox", "--host", PROVIDER, "--port", str(PROVIDER_PORT))
        stack.enter_context(_program(network.world, *sandbox))
        stores = json.loads(stack.enter_context(_program(network.stores, "tests.network.stores", *where)))
        nodes = [_make_node(network.add(name), disk / name, stores) for name in ("a", "b")]
        nodes[0].ctl("migrate", "up")
        for node in nodes:
            stack.callback(node.stop)
            node.start()
        yield Cluster(network, stores, disk, *nodes)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Everything, running, for tests that leave both nodes as they were; skipped where no namespace can be made."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with _cluster() as running:
        yield running
