"""Hearing and publishing changes through a real Valkey."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from uuid import UUID, uuid4

import pytest

from ibex.stores.redis.subscription import CHANGES_CHANNEL, ChangeSubscription, boot_time, publish_changes
from tests.valkey import Valkey, open_lane, run_valkey
from tests.waiting import eventually


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with run_valkey() as server:
        yield server


@dataclass
class Listener:
    subscription: ChangeSubscription
    heard: list[tuple[str, UUID]] = field(default_factory=list)


@asynccontextmanager
async def listening(url: str) -> AsyncIterator[Listener]:
    heard: list[tuple[str, UUID]] = []
    listener = Listener(ChangeSubscription(url, lambda kind, entity_id: heard.append((kind, entity_id))), heard)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(listener.subscription.run())
        try:
            yield listener
        finally:
            task.cancel()


async def test_published_changes_are_heard_in_order(valkey: Valkey) -> None:
    changes = [("token", uuid4()), ("agent", uuid4()), ("limit", uuid4())]
    before = boot_time()
    async with listening(valkey.url) as listener:
        await eventually(lambda: listener.subscription.unbroken_since)
        assert await publish_changes(valkey.url, changes)
        await eventually(lambda: len(listener.heard) == 3)
        assert listener.heard == changes
        await eventually(lambda: listener.subscription.last_pong_sent_at)
        since, pong = listener.subscription.unbroken_since, listener.subscription.last_pong_sent_at
        assert since is not None
        assert pong is not None
        assert before <= since <= pong <= boot_time()
    assert listener.subscription.unbroken_since is None


async def test_pings_go_on(valkey: Valkey) -> None:
    async with listening(valkey.url) as listener:
        await eventually(lambda: listener.subscription.last_pong_sent_at)
        first = listener.subscription.last_pong_sent_at
        await eventually(lambda: listener.subscription.last_pong_sent_at != first)
        assert listener.subscription.unbroken_since is not None


@pytest.mark.parametrize(
    "message",
    [
        "not json",
        "[]",
        "{}",
        '{"kind": 1, "entity_id": "00000000-0000-0000-0000-000000000001"}',
        '{"kind": "token", "entity_id": "hush-hush"}',
        '{"kind": "token", "entity_id": 7}',
        b"\xff\xfe",
        "[" * 100_000,
    ],
)
async def test_a_malformed_message_is_logged_without_its_content_and_ignored(
    valkey: Valkey, caplog: pytest.LogCaptureFixture, message: str | bytes
) -> None:
    async with listening(valkey.url) as listener, open_lane(valkey.url) as lane:
        await eventually(lambda: listener.subscription.unbroken_since)
        since = listener.subscription.unbroken_since
        await lane.call("PUBLISH", CHANGES_CHANNEL, message)
        change = {"kind": "user", "entity_id": str(uuid4())}
        await lane.call("PUBLISH", CHANGES_CHANNEL, json.dumps(change))
        await eventually(lambda: listener.heard)
        assert listener.heard == [("user", UUID(change["entity_id"]))]
        assert listener.subscription.unbroken_since == since
    assert "change message ignored" in caplog.text
    assert "hush" not in caplog.text


async def test_a_frozen_redis_breaks_the_subscription_and_it_comes_back(valkey: Valkey) -> None:
    async with listening(valkey.url) as listener:
        await eventually(lambda: listener.subscription.unbroken_since)
        first = listener.subscription.unbroken_since
        with valkey.frozen():
            await eventually(lambda: listener.subscription.unbroken_since is None)
            assert listener.subscription.last_pong_sent_at is None
            assert not await publish_changes(valkey.url, [("token", uuid4())])
        await eventually(lambda: listener.subscription.unbroken_since)
        assert first is not None
        assert (listener.subscription.unbroken_since or 0) > first


async def test_a_cut_connection_breaks_the_subscription_at_once(valkey: Valkey) -> None:
    async with listening(valkey.url) as listener, open_lane(valkey.url) as lane:
        await eventually(lambda: listener.subscription.unbroken_since)
        first = listener.subscription.unbroken_since
        await lane.call("CLIENT", "KILL", "TYPE", "pubsub")
        await eventually(lambda: listener.subscription.unbroken_since not in {None, first})


async def test_publishing_to_a_redis_that_is_away_is_no_error() -> None:
    with run_valkey() as gone:
        gone.stop()
        assert not await publish_changes(gone.url, [("token", uuid4())])
        assert await publish_changes(gone.url, [])
