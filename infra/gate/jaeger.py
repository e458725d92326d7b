"""The same spans in a real Jaeger, where there is one: handed to it as they came, and looked up as a person would."""

import asyncio
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import aiohttp

from infra.gate.proof import Proof, Status, judge
from infra.gate.site import Site

PROGRAM = "jaeger-all-in-one"
_OTLP_PORT = 4318
_SECONDS = 20.0
_LISTENERS = (
    "query.http-server",
    "collector.otlp.http",
    "collector.otlp.grpc",
    "collector.http-server",
    "collector.grpc-server",
    "query.grpc-server",
    "admin.http",
)
"""Where Jaeger listens, by its flags; the first two are asked."""


class Jaeger:
    """A Jaeger by the address of its query service, else one of the gate's own, where the program is on the PATH.

    One that is named takes OTLP over HTTP on port 4318 of the same host.
    """

    def __init__(self, url: str | None) -> None:
        self._url = url and url.rstrip("/")

    async def prove(self, site: Site) -> Proof:
        """Whether a trace that the house exported can be looked up there."""
        how = "the spans as they came, handed on to a Jaeger and looked up by their trace's id"
        if self._url is not None:
            return await _show(site, how, self._url, f"http://{urlsplit(self._url).hostname}:{_OTLP_PORT}")
        if (program := shutil.which(PROGRAM)) is None:
            return Proof(Status.PENDING, how, f"not seen here: no JAEGER_URL, and no {PROGRAM} on the PATH")
        async with _own_jaeger(program) as (query, collector):
            return await _show(site, how, query, collector)


async def _show(site: Site, how: str, query: str, collector: str) -> Proof:
    wanted = site.spans.last_trace()
    if wanted is None:
        return Proof(Status.FAIL, how, "no spans came from the house")
    await _reach(site.client, query)
    for request in site.spans.requests:
        body, head = request.SerializeToString(), {"Content-Type": "application/x-protobuf"}
        async with site.client.post(f"{collector}/v1/traces", data=body, headers=head) as response:
            response.raise_for_status()
    expected = len(site.spans.of_trace(wanted))
    shown = await _look_up(site.client, f"{query}/api/traces/{wanted.hex()}", expected)
    return judge(shown == expected, how, f"seen: {shown} of the trace's {expected} spans")


async def _reach(client: aiohttp.ClientSession, query: str) -> None:
    """Wait until it answers. Raises TimeoutError."""
    async with asyncio.timeout(_SECONDS):
        while True:
            try:
                async with client.get(f"{query}/api/services"):
                    return
            except aiohttp.ClientConnectionError:
                await asyncio.sleep(0.1)


async def _look_up(client: aiohttp.ClientSession, url: str, expected: int) -> int:
    """How many spans it shows, once that is all of them or it has had its time."""
    shown, deadline = 0, asyncio.get_running_loop().time() + _SECONDS
    while shown < expected and asyncio.get_running_loop().time() < deadline:
        async with client.get(url) as response:
            found = (await response.json()).get("data") if response.status == 200 else None
        shown = len(found[0]["spans"]) if found else 0
        await asyncio.sleep(0.2)
    return shown


@asynccontextmanager
async def _own_jaeger(program: str) -> AsyncIterator[tuple[str, str]]:
    """A Jaeger that keeps everything in memory, on free ports of loopback: its query service and its collector."""
    places = [f"127.0.0.1:{port}" for port in _free_ports(len(_LISTENERS))]
    flags = [f"--{flag}.host-port={place}" for flag, place in zip(_LISTENERS, places, strict=True)]
    process = await asyncio.create_subprocess_exec(
        program, *flags, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        yield f"http://{places[0]}", f"http://{places[1]}"
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports
