"""Idempotency keys: what each state of a key means to the next request, and who can read what is kept."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from uuid import UUID, uuid4

import pytest

from ibex.domain.identity import PROXY_CHAT, AgentId, OrgId, Principal, UserId, mint_token
from ibex.domain.turns import mint_turn_id
from ibex.errors import IdempotencyInProgress, IdempotencyKeyReuse, ServiceDegraded, StoreUnavailable
from ibex.pipeline import idempotency
from ibex.pipeline.idempotency import MAX_REPLY_BYTES, Claim, Idempotency, StoredReply, is_idempotency_key
from ibex.stores.redis import idempotency as stored
from ibex.stores.redis.lane import RedisLane
from ibex.telemetry import Metrics
from tests.valkey import Valkey, open_lane, run_valkey
from tests.waiting import eventually

BODY = b"d" * 32
OTHER_BODY = b"e" * 32


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with run_valkey() as server:
        yield server


@pytest.fixture
async def lane(valkey: Valkey) -> AsyncIterator[RedisLane]:
    async with open_lane(valkey.url) as one:
        await one.call("FLUSHDB")
        yield one


class Caller:
    """A token, its agent, and requests under one key."""

    def __init__(self, lane: RedisLane) -> None:
        self.metrics = Metrics()
        self.idempotency = Idempotency(lane, self.metrics)
        token = mint_token()
        self.bearer = token.bearer
        self.principal = Principal(
            token_id=token.token_id,
            org_id=OrgId(uuid4()),
            user_id=UserId(uuid4()),
            agent_id=AgentId(uuid4()),
            permissions=PROXY_CHAT,
            org_rpm=None,
            agent_rpm=None,
        )

    async def ask(self, key: str = "order 66", body: bytes = BODY) -> Claim | StoredReply:
        return await self.idempotency.claim(self.principal, key, self.bearer, body, mint_turn_id())

    async def claim(self, key: str = "order 66", body: bytes = BODY) -> Claim:
        claim = await self.ask(key, body)
        assert isinstance(claim, Claim)
        return claim

    def count(self, result: str) -> float:
        return self.metrics.idempotency_total.labels(result).value


@pytest.fixture
def caller(lane: RedisLane) -> Caller:
    return Caller(lane)


def make_reply(body: bytes = b'{"ok":true}', *, is_streaming: bool = False) -> StoredReply:
    return StoredReply(
        status=200,
        headers=(("Content-Type", "application/json"), ("X-Provider-Request-ID", "req_1")),
        body=body,
        is_streaming=is_streaming,
        turn_id=mint_turn_id(),
        external_id="session-1",
    )


@pytest.mark.parametrize("is_streaming", [False, True])
async def test_the_same_request_gets_the_answer_that_was_given(caller: Caller, is_streaming: bool) -> None:
    claim = await caller.claim()
    reply = make_reply(is_streaming=is_streaming)
    assert await claim.store(reply)
    claim.free()
    for _ in range(2):
        assert await caller.ask() == reply
    assert isinstance(reply.turn_id, UUID)
    assert (caller.count("miss"), caller.count("hit")) == (1, 2)


async def test_a_request_that_is_running_is_not_sent_twice(caller: Caller) -> None:
    await caller.claim()
    fates = await asyncio.gather(*(caller.ask() for _ in range(5)), return_exceptions=True)
    assert all(isinstance(fate, IdempotencyInProgress) for fate in fates)
    assert caller.count("in_progress") == 5


async def test_of_many_at_once_one_is_sent(caller: Caller) -> None:
    fates = await asyncio.gather(*(caller.ask() for _ in range(20)), return_exceptions=True)
    assert sum(isinstance(fate, Claim) for fate in fates) == 1


async def test_a_request_that_failed_may_be_sent_again(caller: Caller, lane: RedisLane) -> None:
    for _ in range(2):
        await lane.call("SCRIPT", "FLUSH")
        (await caller.claim()).free()
    assert caller.count("miss") == 2


async def test_a_whole_answer_is_kept_though_its_client_has_left(caller: Caller) -> None:
    claim, reply = await caller.claim(), make_reply()
    committed = asyncio.get_running_loop().create_future()
    keeping = claim.store_after(committed, reply)
    claim.free()
    with pytest.raises(IdempotencyInProgress):
        await caller.ask()
    committed.set_result(None)
    assert await keeping
    assert await caller.ask() == reply


async def test_an_answer_whose_turn_was_not_committed_frees_the_key(caller: Caller) -> None:
    claim = await caller.claim()
    committed = asyncio.get_running_loop().create_future()
    keeping = claim.store_after(committed, make_reply())
    committed.set_exception(StoreUnavailable())
    assert not await keeping
    await caller.claim()


async def test_another_body_under_the_key_is_refused_running_or_done(caller: Caller) -> None:
    claim = await caller.claim()
    with pytest.raises(IdempotencyKeyReuse, match="another body"):
        await caller.ask(body=OTHER_BODY)
    await claim.store(make_reply())
    with pytest.raises(IdempotencyKeyReuse, match="another body"):
        await caller.ask(body=OTHER_BODY)
    assert caller.count("conflict") == 2


async def test_another_agent_under_the_key_is_refused(caller: Caller) -> None:
    await (await caller.claim()).store(make_reply())
    caller.principal = replace(caller.principal, agent_id=AgentId(uuid4()))
    with pytest.raises(IdempotencyKeyReuse, match="another agent"):
        await caller.ask()


async def test_keys_belong_to_a_token(lane: RedisLane) -> None:
    one, other = Caller(lane), Caller(lane)
    await one.claim()
    await other.claim()
    await one.claim("another key")


async def test_an_answer_too_large_to_keep_is_refused_and_said_to_be(caller: Caller, lane: RedisLane) -> None:
    claim = await caller.claim("just fits")
    assert await claim.store(make_reply(b"x" * MAX_REPLY_BYTES))
    kept = await caller.ask("just fits")
    assert isinstance(kept, StoredReply)
    assert len(kept.body) == MAX_REPLY_BYTES
    claim = await caller.claim("too large")
    assert await claim.store(make_reply(b"x" * (MAX_REPLY_BYTES + 1)))
    with pytest.raises(IdempotencyKeyReuse, match="too large to keep"):
        await caller.ask("too large")
    assert await lane.call("HSTRLEN", claim.key, "reply") == 0
    assert (caller.count("skipped"), caller.count("conflict")) == (1, 1)


async def test_what_is_kept_is_kept_for_a_day_and_cannot_be_read_without_the_bearer(
    caller: Caller, lane: RedisLane
) -> None:
    claim = await caller.claim("my private key")
    await claim.store(make_reply(b'{"secret":"the plan"}'))
    (key,) = await lane.call("KEYS", "*")
    fields = await lane.call("HGETALL", key)
    for value in (key, *fields):
        assert b"plan" not in value
        assert b"private" not in value
        assert BODY not in value
        assert caller.bearer.encode() not in value
        assert caller.bearer[-43:].encode() not in value
    assert key.startswith(f"ibex:idempotency:{{{caller.principal.org_id}}}:".encode())
    assert 86_390_000 < await lane.call("PTTL", key) <= 86_400_000
    caller.bearer = mint_token().bearer
    with pytest.raises(IdempotencyKeyReuse):
        await caller.ask("my private key")
    # even where Redis itself was made to believe that the request is the same
    await lane.call("HSET", key, "request", (await caller.claim("of the thief")).request)
    with pytest.raises(ServiceDegraded):
        await caller.ask("my private key")


async def test_an_answer_that_was_tampered_with_or_moved_is_not_replayed(caller: Caller, lane: RedisLane) -> None:
    one, other = await caller.claim("one"), await caller.claim("other")
    await one.store(make_reply(b"first"))
    await other.store(make_reply(b"second"))
    await lane.call("HSET", other.key, "reply", await lane.call("HGET", one.key, "reply"))
    with pytest.raises(ServiceDegraded):
        await caller.ask("other")
    await lane.call("HSET", one.key, "reply", b"short")
    with pytest.raises(ServiceDegraded):
        await caller.ask("one")


async def test_nothing_private_is_in_a_repr(caller: Caller) -> None:
    assert "plan" not in repr(make_reply(b"the plan"))
    assert repr(await caller.claim()).count("=") == 2


async def test_a_running_request_keeps_its_lease(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "LEASE_MS", 400)
    monkeypatch.setattr(idempotency, "RENEW_SECONDS", 0.1)
    claim = await caller.claim()
    await asyncio.sleep(0.9)
    with pytest.raises(IdempotencyInProgress):
        await caller.ask()
    assert await claim.store(make_reply())
    await asyncio.sleep(0.3)
    assert isinstance(await caller.ask(), StoredReply)


async def test_a_late_answer_does_not_replace_the_one_that_came_after_its_lease(
    caller: Caller, lane: RedisLane
) -> None:
    late = await caller.claim()
    await lane.call("DEL", late.key)  # as the lease's end does
    second = await caller.claim()
    assert not await late.store(make_reply(b"late"))
    with pytest.raises(IdempotencyInProgress):
        await caller.ask()
    await second.store(make_reply(b"second"))
    kept = await caller.ask()
    assert isinstance(kept, StoredReply)
    assert kept.body == b"second"
    assert caller.count("skipped") == 1


async def test_a_late_answer_is_kept_when_nobody_took_the_key(caller: Caller, lane: RedisLane) -> None:
    late = await caller.claim()
    await lane.call("DEL", late.key)
    assert await late.store(make_reply())
    assert isinstance(await caller.ask(), StoredReply)


async def test_freeing_a_key_that_another_took_leaves_it(caller: Caller, lane: RedisLane) -> None:
    late = await caller.claim()
    await lane.call("DEL", late.key)
    await caller.claim()
    late.free()
    with pytest.raises(IdempotencyInProgress):
        await caller.ask()


async def test_a_caller_that_leaves_while_claiming_leaves_no_claim(caller: Caller, lane: RedisLane) -> None:
    await lane.call("SCRIPT", "FLUSH")
    asking = asyncio.ensure_future(caller.ask())
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await caller.claim()


KILLED_WORKER = """
import asyncio, sys, uuid
from ibex.domain.identity import PROXY_CHAT, AgentId, OrgId, Principal, TokenId, UserId
from ibex.domain.turns import mint_turn_id
from ibex.pipeline import idempotency
from ibex.stores.redis import idempotency as stored
from ibex.stores.redis.lane import RedisLane
from ibex.telemetry import Metrics

async def main(url, bearer, *ids):
    stored.LEASE_MS, idempotency.RENEW_SECONDS = 700, 0.1
    token, org, user, agent = map(uuid.UUID, ids)
    principal = Principal(TokenId(token), OrgId(org), UserId(user), AgentId(agent), PROXY_CHAT, None, None)
    lane = RedisLane(url, deadline=1.0)
    await lane.connect()
    await idempotency.Idempotency(lane, Metrics()).claim(principal, "order 66", bearer, b"d" * 32, mint_turn_id())
    print("claimed", flush=True)
    await asyncio.sleep(60)

asyncio.run(main(*sys.argv[1:]))
"""


async def test_a_killed_worker_frees_its_keys(caller: Caller, lane: RedisLane, valkey: Valkey) -> None:
    who = caller.principal
    ids = [str(value) for value in (who.token_id, who.org_id, who.user_id, who.agent_id)]
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-c", KILLED_WORKER, valkey.url, caller.bearer, *ids, stdout=asyncio.subprocess.PIPE
    )
    assert worker.stdout is not None
    assert await worker.stdout.readline() == b"claimed\n"
    await asyncio.sleep(0.8)
    with pytest.raises(IdempotencyInProgress):
        await caller.ask()
    worker.send_signal(signal.SIGKILL)
    await worker.wait()
    async with asyncio.timeout(20):
        while True:
            try:
                assert isinstance(await caller.ask(), Claim)
                break
            except IdempotencyInProgress:
                await asyncio.sleep(0.05)


async def test_without_redis_a_key_is_not_honoured_and_the_request_not_sent() -> None:
    with run_valkey() as server:
        async with open_lane(server.url) as lane:
            caller = Caller(lane)
            claim = await caller.claim()
            server.stop()
            await eventually(lambda: not lane.is_connected)
            with pytest.raises(ServiceDegraded):
                await caller.ask("new")
            assert not await claim.store(make_reply())
            assert caller.count("redis_error") == 2


async def test_freeing_without_redis_does_not_fail() -> None:
    with run_valkey() as server:
        async with open_lane(server.url) as lane:
            claim = await Caller(lane).claim()
            server.stop()
            claim.free()


@pytest.mark.parametrize("key", ["k", "a b", "~" * 256, "order:66/x"])
def test_printable_ascii_may_be_a_key(key: str) -> None:
    assert is_idempotency_key(key)


@pytest.mark.parametrize("key", ["", "a\n", "ä", "\x7f", "x" * 257, "a\tb"])
def test_anything_else_may_not(key: str) -> None:
    assert not is_idempotency_key(key)
