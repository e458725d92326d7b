"""Rate limits over two nodes of two workers each, one of which may not load scripts: exact, shared out, and exact."""

import asyncio
from collections import Counter

import redis

from ibex.pipeline.rate_limiting import BEAT_SECONDS
from ibex.stores.redis.rate_limits import NODES_KEY
from tests.security.nodes import CHAT, Answer, Line, Nodes
from tests.tenants import Tenant, make_tenant
from tests.waiting import eventually


async def ask_at_once(nodes: Nodes, tenant: Tenant, count: int) -> list[Answer]:
    """So many chats, each on a connection of its own, half of them at each node."""
    async with nodes.connections(count) as connections:
        return await asyncio.gather(*(one.ask(tenant, CHAT) for one in connections))


async def wait_until_counted_together(lines: list[Line], tenant: Tenant) -> None:
    """Return when the four workers count in the same place: each sees one place less than the one before it."""
    async with asyncio.timeout(30):
        while True:
            seen = [int((await line.ask(tenant, CHAT)).headers["x-ratelimit-remaining"]) for line in lines]
            if seen == list(range(seen[0], seen[0] - len(lines), -1)):
                return
            await asyncio.sleep(0.05)


async def wait_until_each_knows_the_other(nodes: Nodes) -> None:
    """Return when both have said that they are there, and each worker has had the time to count them."""
    with redis.from_url(nodes.redis_url) as client:
        await eventually(lambda: client.zcard(NODES_KEY) == 2)
    await asyncio.sleep(BEAT_SECONDS + 1)


def statuses(answers: list[Answer]) -> Counter[int]:
    return Counter(answer.status for answer in answers)


async def test_of_two_hundred_at_once_at_two_nodes_a_limit_of_a_hundred_lets_a_hundred_pass(nodes: Nodes) -> None:
    async with nodes.admin() as admin, nodes.lines() as lines:
        tenant, scratch = await make_tenant(admin, "Crowd"), await make_tenant(admin, "Scratch")
        await admin.set_limit(tenant.org_id, 100)
        await admin.set_limit(scratch.org_id, 100_000)
        await wait_until_counted_together(lines, scratch)
        answers = await ask_at_once(nodes, tenant, 200)

        assert statuses(answers) == {200: 100, 429: 100}
        passed = sorted(int(answer.headers["x-ratelimit-remaining"]) for answer in answers if answer.status == 200)
        assert passed == list(range(100))
        for answer in answers:
            assert answer.headers["x-ratelimit-limit"] == "100"
            if answer.status == 429:
                assert 1 <= int(answer.headers["retry-after"]) <= 60
                assert answer.headers["x-ratelimit-remaining"] == "0"


async def test_an_agents_limit_holds_over_both_nodes_within_its_organizations(nodes: Nodes) -> None:
    async with nodes.admin() as admin, nodes.lines() as lines:
        tenant, scratch = await make_tenant(admin, "Nested"), await make_tenant(admin, "Scratch")
        await admin.set_limit(tenant.org_id, 40)
        await admin.set_limit(tenant.org_id, 10, tenant.agent_id)
        await admin.set_limit(scratch.org_id, 100_000)
        free = await admin.register_agent(tenant.org_id, "without a limit of its own")
        other = Tenant(tenant.org_id, tenant.user_id, free["agent_id"], tenant.token_id, tenant.bearer)
        await wait_until_counted_together(lines, scratch)

        assert statuses(await ask_at_once(nodes, tenant, 40)) == {200: 10, 429: 30}
        assert statuses(await ask_at_once(nodes, other, 40)) == {200: 30, 429: 10}


async def test_without_redis_each_worker_keeps_to_its_share_and_with_it_again_the_limit_is_exact(nodes: Nodes) -> None:
    async with nodes.admin() as admin, nodes.lines() as lines:
        tenant, scratch, after = [await make_tenant(admin, name) for name in ("Outage", "Scratch", "After")]
        await admin.set_limit(tenant.org_id, 20)
        await admin.set_limit(after.org_id, 20)
        await admin.set_limit(scratch.org_id, 100_000)
        for line in lines:
            assert (await line.ask(scratch)).status == (await line.ask(tenant)).status == 200
        await wait_until_each_knows_the_other(nodes)
        nodes.valkey.stop()
        try:
            for line in lines:
                answers = [await line.ask(tenant, CHAT) for _ in range(8)]
                assert [answer.status for answer in answers] == [200] * 5 + [429] * 3
                assert {answer.headers["x-ratelimit-limit"] for answer in answers} == {"20"}
                assert all(1 <= int(answer.headers["retry-after"]) <= 60 for answer in answers[5:])
        finally:
            nodes.valkey.start()
        await wait_until_counted_together(lines, scratch)
        assert statuses(await ask_at_once(nodes, after, 40)) == {200: 20, 429: 20}
