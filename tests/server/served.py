"""`ibexctl serve` and its like as processes of their own on the session's stores, and what a client gets of them."""

import asyncio
import json
import re
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ibex.config import Settings, child_environment
from ibex.sandbox import Sandbox
from tests.server.nodes import is_alive

_PASSING = re.compile(rb'"(id|created)":("[^"]*"|\d+)')
"""What differs from one completion to the next: who it is, and when it was made."""


@dataclass
class Served:
    """A program that serves, or served."""

    process: asyncio.subprocess.Process
    facts: dict[str, Any]
    """The one object on its standard output."""

    @property
    def url(self) -> str:
        return str(self.facts["url"])

    @property
    def pids(self) -> list[int]:
        return [process["pid"] for process in self.facts.get("processes", [self.facts])]

    async def stop(self) -> tuple[int, str]:
        """SIGTERM; the exit code, and what it said on standard error."""
        self.process.send_signal(signal.SIGTERM)
        return await self.ended()

    async def ended(self) -> tuple[int, str]:
        """Wait for its end; nothing more may have come on standard output, and no process be left."""
        said, errors = await asyncio.wait_for(self.process.communicate(), 60)
        assert said == b""
        assert not any(is_alive(pid) for pid in self.pids)
        assert self.process.returncode is not None
        return self.process.returncode, errors.decode()


async def start(settings: Settings, *arguments: str) -> asyncio.subprocess.Process:
    """Start `ibexctl` with these arguments and settings."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "ibexctl", *arguments),
        env={**child_environment(settings, with_provider_keys=True), "IBEX_PORT": str(settings.port)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def run(settings: Settings, *arguments: str) -> tuple[int | None, str, str]:
    """Run `ibexctl` to its end; its exit code, and what it printed on each of its outputs."""
    process = await start(settings, *arguments)
    said, errors = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode, said.decode(), errors.decode()


@asynccontextmanager
async def served(settings: Settings, *arguments: str) -> AsyncIterator[Served]:
    """Run `ibexctl serve --json`, or what the arguments say, until it was stopped, or is killed at the end."""
    process = await start(settings, *(arguments or ("serve",)), "--json")
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), 60)
        assert line, (await process.communicate())[1].decode()
        yield Served(process, json.loads(line))
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


def with_upstream(settings: Settings, sandbox: Sandbox) -> Settings:
    """The same with this provider, limits out of the way, and few words: nobody reads them before the end."""
    changes = {"openai_base_url": sandbox.base_url, "rate_limit_rpm": 1_000_000, "access_log": False}
    return settings.model_copy(update=changes)


@dataclass(frozen=True, slots=True)
class Reply:
    """All that came over a connection of one request, until the server closed it."""

    head: bytes
    wire: bytes

    @property
    def status(self) -> int:
        return int(self.head.split(b" ", 2)[1])

    @property
    def events(self) -> bytes:
        """The body without its chunks' frames; fails when it has no end."""
        body, rest = b"", self.wire
        while True:
            size, _, rest = rest.partition(b"\r\n")
            length = int(size, 16)
            if not length:
                assert rest == b"\r\n", rest
                return body
            body += rest[:length]
            assert rest[length : length + 2] == b"\r\n"
            rest = rest[length + 2 :]

    @property
    def lasting_events(self) -> bytes:
        """The same without what no two completions have in common."""
        return _PASSING.sub(rb'"\1":_', self.events)


async def ask(
    url: str, headers: Mapping[str, str], body: Mapping[str, Any], began: asyncio.Event | None = None
) -> Reply:
    """Post a chat over a connection of its own; `began` is set with the first byte of the body."""
    where = urlsplit(url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    try:
        payload = json.dumps(body).encode()
        fields = {**headers, "Host": where.netloc, "Content-Type": "application/json", "Content-Length": len(payload)}
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        writer.write(f"POST /v1/chat/completions HTTP/1.1\r\n{lines}Connection: close\r\n\r\n".encode() + payload)
        head = await reader.readuntil(b"\r\n\r\n")
        wire = await reader.read(1)
        if began is not None:
            began.set()
        return Reply(head, wire + await reader.read())
    finally:
        writer.transport.abort()
