"""What clients ask of the nodes, and whether what they saw is recorded."""

import asyncio
import json
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any
from uuid import UUID

import aiohttp

from ibex.telemetry import spawn
from tests.network.conftest import Cluster, Node
from tests.tenants import Tenant


def headers_of(tenant: Tenant) -> dict[str, str]:
    """What the tenant's agent presents, in the one session of a test."""
    return {
        "Authorization": f"Bearer {tenant.bearer}",
        "X-IBEX-Agent-ID": str(tenant.agent_id),
        "X-IBEX-Session-ID": "s-1",
    }


def make_chat(**changes: Any) -> dict[str, Any]:
    """A chat's body."""
    message = {"role": "user", "content": "Reply with exactly: hello"}
    return {"model": "gpt-4o-mini", "messages": [message], **changes}


def ask(
    http: aiohttp.ClientSession, node: Node, tenant: Tenant, **changes: Any
) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
    """One completion, to be entered."""
    return http.post(f"{node.url}/v1/chat/completions", json=make_chat(**changes), headers=headers_of(tenant))


async def chat(http: aiohttp.ClientSession, node: Node, tenant: Tenant) -> tuple[int, Any, str]:
    """One completion: status, the error's code, the turn's id."""
    async with ask(http, node, tenant) as response:
        answer = await response.json()
        return response.status, answer.get("error", {}).get("code"), response.headers.get("X-IBEX-Turn-ID", "")


class Stream:
    """A stream of two seconds, read to its end in the background."""

    def __init__(self, http: aiohttp.ClientSession, node: Node, tenant: Tenant) -> None:
        slow = json.dumps({"events": 20, "gap_ms": 100})
        self._request = ask(http, node, tenant, stream=True, metadata={"sandbox": slow})
        self._has_begun = asyncio.Event()
        self.turn = UUID(int=0)
        self.end = spawn(self._read(), name="a client's stream")
        """Whether it was whole; raises what the client would see."""

    async def begun(self) -> None:
        """Return when its first bytes are there."""
        await self._has_begun.wait()

    async def _read(self) -> bool:
        async with self._request as response:
            self.turn = UUID(response.headers["X-IBEX-Turn-ID"])
            body = await response.content.readany()
            self._has_begun.set()
            return (body + await response.read()).endswith(b"data: [DONE]\n\n")


async def served(http: aiohttp.ClientSession, node: Node, tenant: Tenant, count: int) -> list[UUID]:
    """So many completions one after the other, all of them whole; their turns."""
    turns = []
    for _ in range(count):
        status, code, turn = await chat(http, node, tenant)
        assert status == 200, code
        turns.append(UUID(turn))
    return turns


async def until(node: Node, tenant: Tenant, http: aiohttp.ClientSession, wanted: set[tuple[int, str | None]]) -> float:
    """Ask on until the answer is among the wanted; the seconds it took."""
    began = time.monotonic()
    async with asyncio.timeout(60):
        while (await chat(http, node, tenant))[:2] not in wanted:  # noqa: ASYNC110 - it happens elsewhere
            await asyncio.sleep(0.05)
    return time.monotonic() - began


async def recorded(cluster: Cluster, tenant: Tenant, turns: Sequence[UUID]) -> None:
    """Every turn is in both stores, once, and their indexes have neither gaps nor doubles."""
    async with asyncio.timeout(60):
        while len(found := await cluster.checkpoints(tenant)) < len(turns):  # noqa: ASYNC110 - it happens elsewhere
            await asyncio.sleep(0.1)
        while len(traces := await asyncio.to_thread(cluster.traces, tenant)) < len(turns):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    assert [index for index, _ in found] == list(range(len(turns)))
    assert sorted(turn for _, turn in found) == sorted(turns)
    assert sorted(traces) == sorted(turns)
