"""Idempotency keys over two nodes: one call to the provider, one answer everywhere, and nothing to read in Redis."""

import asyncio
import json
import os
import signal
from typing import Any
from uuid import uuid4

import aiohttp
import pytest
import redis

from ibex.pipeline.idempotency import RENEW_SECONDS
from ibex.stores.redis.idempotency import LEASE_MS
from tests.security.nodes import CHAT, Nodes, make_chat
from tests.tenants import Tenant, make_tenant

Reply = tuple[int, dict[str, str], bytes]


async def chat(nodes: Nodes, place: int, tenant: Tenant, key: str, **body: Any) -> Reply:
    """A chat at one of the nodes, streamed or not, under an idempotency key."""
    headers = {
        "Authorization": f"Bearer {tenant.bearer}",
        "X-IBEX-Agent-ID": str(tenant.agent_id),
        "Idempotency-Key": key,
        "Content-Type": "application/json",
    }
    url = nodes.houses[place].url + CHAT
    async with aiohttp.ClientSession() as http, http.post(url, data=make_chat(**body), headers=headers) as response:
        return response.status, {k.lower(): v for k, v in response.headers.items()}, await response.read()


def said(words: str, **sandbox: Any) -> dict[str, Any]:
    """A body's fields: what the user says, and what is asked of the sandbox."""
    return {"messages": [{"role": "user", "content": words}], "metadata": {"sandbox": json.dumps(sandbox)}}


def code_of(reply: Reply) -> str | None:
    return json.loads(reply[2])["error"]["code"] if reply[0] >= 400 else None


@pytest.mark.parametrize("is_streaming", [False, True], ids=["JSON", "stream"])
async def test_a_key_at_both_nodes_at_once_is_one_call_and_one_answer_everywhere(
    nodes: Nodes, is_streaming: bool
) -> None:
    marker, key = str(uuid4()), str(uuid4())
    body = said(marker, delay_ms=400) | ({"stream": True} if is_streaming else {})
    async with nodes.admin() as admin:
        tenant = await make_tenant(admin, "Twice")
    replies = await asyncio.gather(*(chat(nodes, place, tenant, key, **body) for place in (0, 1, 0, 1)))

    answered = [reply for reply in replies if reply[0] == 200]
    assert len(answered) == 1
    assert [code_of(reply) for reply in replies if reply[0] != 200] == ["IDEMPOTENCY_IN_PROGRESS"] * 3
    _, headers, content = answered[0]
    assert "x-ibex-replayed" not in headers
    for place in (0, 1):
        status, again, replayed = await chat(nodes, place, tenant, key, **body)
        assert (status, again["x-ibex-replayed"], replayed) == (200, "true", content)
        for name in ("x-ibex-turn-id", "x-ibex-session-id", "content-type"):
            assert again[name] == headers[name]
        other = await chat(nodes, place, tenant, key, **body | {"temperature": 0.5})
        assert (other[0], code_of(other)) == (409, "IDEMPOTENCY_KEY_REUSE")
    assert len(await nodes.upstream_requests(marker)) == 1


async def test_a_worker_killed_in_the_middle_frees_its_key_within_the_lease(nodes: Nodes) -> None:
    marker, key = str(uuid4()), str(uuid4())
    async with nodes.admin() as admin, nodes.lines() as lines:
        tenant = await make_tenant(admin, "Killed")
        await admin.set_limit(tenant.org_id, 1000)
        victim = lines[2]
        body = said(marker, delay_ms=500)
        running = asyncio.create_task(victim.ask(tenant, CHAT, key=key, **body))
        async with asyncio.timeout(10):
            while not await nodes.upstream_requests(marker):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        os.kill(victim.pid or 0, signal.SIGKILL)
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await running
        with redis.from_url(nodes.redis_url) as client:
            (name,) = client.keys(f"ibex:idempotency:*{tenant.token_id}*")
            left = client.pttl(name)
            await asyncio.sleep(RENEW_SECONDS + 0.5)
            assert 0 < client.pttl(name) <= min(left, LEASE_MS) - RENEW_SECONDS * 1000  # nobody renews it
            assert code_of(await chat(nodes, 0, tenant, key, **body)) == "IDEMPOTENCY_IN_PROGRESS"
            client.pexpire(name, 1)  # the rest of the lease passes
        await asyncio.sleep(0.05)
        status, headers, _ = await chat(nodes, 0, tenant, key, **body)
        assert (status, headers.get("x-ibex-replayed")) == (200, None)

    status, headers, _ = await chat(nodes, 1, tenant, key, **body)
    assert (status, headers["x-ibex-replayed"]) == (200, "true")


async def test_without_redis_a_key_is_refused_and_nobody_is_called(nodes: Nodes) -> None:
    marker = str(uuid4())
    async with nodes.admin() as admin:
        tenant = await make_tenant(admin, "Keyless")
    nodes.valkey.stop()
    try:
        for place in (0, 1):
            reply = await chat(nodes, place, tenant, "a key", **said(marker))
            assert (reply[0], code_of(reply)) == (503, "SERVICE_DEGRADED")
    finally:
        nodes.valkey.start()
    assert await nodes.upstream_requests(marker) == []


async def test_a_dump_of_redis_shows_nothing_of_what_was_said(nodes: Nodes) -> None:
    question, answer, key = (f"{word}-{uuid4()}" for word in ("question", "answer", "key"))
    async with nodes.admin() as admin:
        tenant = await make_tenant(admin, "Quiet")
    for place, fields in enumerate(({}, {"stream": True})):
        body = said(f"{question} Reply with exactly: {answer}") | fields
        status, _, content = await chat(nodes, place, tenant, f"{key} {place}", **body)
        assert status == 200
        assert (answer.encode() in content) or place == 1  # a stream comes in pieces

    with redis.from_url(nodes.redis_url) as client:
        names = client.keys()
        dump = b"\n".join([*names, *(client.dump(name) for name in names)])
    assert sum(b"ibex:idempotency:" in name and str(tenant.org_id).encode() in name for name in names) == 2
    assert all(str(tenant.org_id).encode() in name for name in names if str(tenant.token_id).encode() in name)
    secret = tenant.bearer.rpartition("_")[2]
    for text in (question, answer, key, secret, "messages", "choices", "gpt-4o-mini", "sk-of-the-provider"):
        assert text.encode() not in dump
