"""Hearing of changes: from Postgres and from Redis, from one of them, and from neither."""

import asyncio
import time
from dataclasses import replace
from uuid import UUID, uuid4

import asyncpg
import pytest

from ibex.errors import ServiceDegraded
from ibex.pipeline import changes
from ibex.pipeline.changes import ChangeFollower, now
from ibex.stores.postgres import changes as feed_module
from ibex.stores.postgres.changes import Changes
from ibex.telemetry import spawn
from tests.conftest import PostgresDatabase
from tests.pipeline.conftest import Door
from tests.waiting import eventually


def listen(follower: ChangeFollower) -> list[tuple[str, UUID | None]]:
    """What is told from now on."""
    heard: list[tuple[str, UUID | None]] = []
    follower.listen(lambda kind, entity_id: heard.append((kind, entity_id)))
    return heard


async def test_a_poll_puts_what_was_committed_in_force_before_it_returns(door: Door) -> None:
    await door.poll()
    heard = listen(door.follower)
    before = now()
    await door.admin.revoke_token(door.tenant.token_id)
    await door.admin.set_limit(door.tenant.org_id, 5)

    await door.poll()

    assert heard == [("token", door.tenant.token_id), ("limit", door.tenant.org_id)]
    assert door.follower.changed_since(before, [door.tenant.token_id])
    assert not door.follower.changed_since(now(), [door.tenant.token_id])
    assert not door.follower.changed_since(before, [door.tenant.agent_id])
    counts = door.metrics.revocation_lag_seconds.labels().read()
    assert sum(counts[:-1]) == 2


async def test_a_published_change_is_in_force_while_postgres_is_silent(door: Door) -> None:
    await door.hear_redis()
    heard = listen(door.follower)
    door.relay.hold()

    await door.publish("token", door.tenant.token_id)

    assert heard == [("token", door.tenant.token_id)]


async def test_it_asks_about_once_a_second_and_leaves_nothing_behind(door: Door) -> None:
    heard = listen(door.follower)
    before, tasks = door.feed.questions, asyncio.all_tasks()
    run = spawn(door.follower.run(), name="test feed")
    await door.admin.revoke_token(door.tenant.token_id)
    await eventually(lambda: ("token", door.tenant.token_id) in heard)
    await asyncio.sleep(2.2)
    run.cancel()
    await asyncio.gather(run, return_exceptions=True)
    await door.follower.close()

    assert 2 <= door.feed.questions - before <= 6
    assert asyncio.all_tasks() == tasks


async def test_a_read_that_began_before_a_reset_is_worth_nothing(door: Door) -> None:
    heard = listen(door.follower)
    before = now()
    assert door.feed._position is not None
    door.feed._position = replace(door.feed._position, timeline="another server")

    await door.poll()

    assert heard == [("reset", None)]
    assert door.follower.changed_since(before, [])
    assert not door.follower.changed_since(now(), [door.tenant.token_id])


async def test_changes_are_remembered_for_a_minute_and_an_older_read_is_worth_nothing(door: Door) -> None:
    old, new = uuid4(), uuid4()
    door.follower._reset_at -= 3600
    door.follower.take("token", old)
    door.follower._recent[old] -= 61
    door.follower.take("token", new)
    door.follower._forget_old()

    assert list(door.follower._recent) == [new]
    assert not door.follower.changed_since(now() - 59, [old])
    assert door.follower.changed_since(now() - 61, [old])


async def test_more_changes_than_are_remembered_are_a_reset(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "MOST_REMEMBERED", 10)
    heard = listen(door.follower)
    before = now()
    for _ in range(11):
        door.follower.take("token", uuid4())

    assert heard[-1] == ("reset", None)
    assert door.follower.changed_since(before, [])
    assert not door.follower._recent


async def test_what_is_heard_is_believed_for_five_seconds_and_all_who_wait_share_one_question(door: Door) -> None:
    door.grow_old(4.5)
    await door.follower.ensure_current()
    assert door.feed.questions == 1
    door.grow_old()
    assert not door.follower.is_current(now())

    await asyncio.gather(*(door.follower.ensure_current() for _ in range(50)))

    assert door.feed.questions == 2
    assert door.follower.is_current(now())


async def test_a_caller_who_hangs_up_stops_the_question_for_nobody(door: Door) -> None:
    door.grow_old()
    door.feed.answers.shut()
    first, second = (asyncio.get_running_loop().create_task(door.follower.ensure_current()) for _ in range(2))
    await door.feed.answers.reached(2)
    first.cancel()
    await asyncio.sleep(0)
    door.feed.answers.open()

    await second
    assert first.cancelled()
    assert door.feed.questions == 2


@pytest.mark.parametrize("is_hanging", [False, True])
async def test_while_postgres_is_away_an_unbroken_subscription_will_do(door: Door, is_hanging: bool) -> None:
    await door.hear_redis()
    if is_hanging:
        door.relay.hold()
        door.feed._deadline = 0.2
    else:
        await door.relay.stop()
    door.grow_old()

    await door.follower.ensure_current()
    assert door.follower.postgres_is_away
    asked = door.feed.questions
    await door.follower.ensure_current()

    assert door.feed.questions == asked, "while Postgres is known to be away nobody waits for it"


async def test_one_timeout_is_no_outage(door: Door) -> None:
    door.feed._deadline = 0.1
    door.relay.hold()
    metrics = door.metrics
    await door.poll()
    assert not door.follower.postgres_is_away
    assert metrics.store_away.labels("postgres").value == 0
    await door.poll()
    assert door.follower.postgres_is_away
    assert metrics.store_away.labels("postgres").value == 1
    assert metrics.change_polls_total.labels("failed").value == 2
    door.relay.release()
    door.feed._deadline = 5.0
    await door.poll()
    assert not door.follower.postgres_is_away
    assert metrics.store_away.labels("postgres").value == 0


async def test_hearing_neither_store_stops_everybody_until_one_is_back(door: Door) -> None:
    await door.lose_postgres()

    with pytest.raises(ServiceDegraded) as refusal:
        await door.follower.ensure_current()
    assert refusal.value.headers == {"Retry-After": "1"}

    await door.relay.start()
    await door.poll()
    await door.follower.ensure_current()


async def test_whoever_would_be_stopped_asks_once_more_since_postgres_may_be_back(door: Door) -> None:
    await door.lose_postgres()
    await door.relay.start()
    asked = door.feed.questions
    with pytest.raises(ServiceDegraded):
        await door.follower.ensure_current()
    assert door.feed.questions == asked, "it has just been asked"
    door.follower._missed_at -= 1

    await asyncio.gather(*(door.follower.ensure_current() for _ in range(50)))

    assert door.feed.questions == asked + 1


async def test_while_it_is_away_postgres_is_asked_more_often(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "POLL_SECONDS", 3600)
    await door.relay.stop()
    asked = door.feed.questions
    run = spawn(door.follower.run(), name="test feed")
    await eventually(lambda: door.feed.questions >= asked + 4)
    await door.relay.start()
    await eventually(lambda: not door.follower.postgres_is_away)
    run.cancel()
    await asyncio.gather(run, return_exceptions=True)


async def test_a_subscription_is_of_use_soon_after_it_is_made(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "POLL_SECONDS", 3600)
    run = spawn(door.follower.run(), name="test feed")
    await eventually(lambda: door.follower._heard_at > 0)
    door.subscription.unbroken_since = door.subscription.last_pong_sent_at = now()
    await eventually(door.follower._hears_redis)
    run.cancel()
    await asyncio.gather(run, return_exceptions=True)


async def test_a_subscription_is_worth_nothing_unless_unbroken_since_postgres_answered(door: Door) -> None:
    await door.hear_redis()
    await door.lose_postgres()
    await door.follower.ensure_current()
    since = door.subscription.unbroken_since
    door.valkey.stop()
    door.valkey.start()
    await eventually(lambda: door.subscription.unbroken_since not in {None, since})
    await eventually(lambda: door.subscription.last_pong_sent_at)

    with pytest.raises(ServiceDegraded):
        await door.follower.ensure_current()


async def test_a_frozen_redis_is_not_heard(door: Door) -> None:
    await door.hear_redis()
    await door.lose_postgres()
    pong = door.subscription.last_pong_sent_at
    assert pong is not None
    with door.valkey.frozen():
        door.subscription.last_pong_sent_at = pong - 5.1
        with pytest.raises(ServiceDegraded):
            await door.follower.ensure_current()


async def test_nobody_is_served_longer_than_the_most_stale_there_may_be(door: Door) -> None:
    await door.hear_redis()
    await door.lose_postgres()
    door.grow_old(880)
    await door.follower.ensure_current()
    door.grow_old(20)

    with pytest.raises(ServiceDegraded):
        await door.follower.ensure_current()


async def test_an_answer_of_a_standby_does_not_count(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    door.grow_old()
    with monkeypatch.context() as patch:
        patch.setattr(feed_module, "_POLL", feed_module._POLL.replace("pg_is_in_recovery()", "true"))
        with pytest.raises(ServiceDegraded):
            await door.follower.ensure_current()
        assert door.follower.postgres_is_away
    await door.poll()
    await door.follower.ensure_current()


async def test_a_step_of_the_wall_clock_makes_what_is_remembered_doubtful(door: Door) -> None:
    heard = listen(door.follower)
    before = now()
    door.follower._clock_offset += 1.5

    assert not door.follower.is_current(now())
    assert heard == [("reset", None)]
    assert door.follower.changed_since(before, [])
    await door.follower.ensure_current()
    assert heard == [("reset", None)]


async def test_after_a_step_redis_is_not_enough(door: Door) -> None:
    await door.hear_redis()
    await door.lose_postgres()
    await door.follower.ensure_current()
    door.follower._clock_offset -= 1.5

    with pytest.raises(ServiceDegraded):
        await door.follower.ensure_current()


async def test_an_answer_from_before_a_step_does_not_count(door: Door) -> None:
    door.feed.answers.shut()
    poll = asyncio.get_running_loop().create_task(door.poll())
    await door.feed.answers.reached(2)
    door.follower._clock_offset += 1.5
    assert not door.follower.is_current(now())
    door.feed.answers.open()
    await poll

    assert not door.follower.is_current(now())
    await door.poll()
    assert door.follower.is_current(now())


async def test_a_wall_clock_that_drifts_slowly_is_followed(door: Door) -> None:
    heard = listen(door.follower)
    for _ in range(4):
        door.follower._clock_offset += 0.6
        await door.poll()
        assert door.follower.is_current(now())

    assert heard == []
    assert abs(door.follower._clock_offset - (time.time() - now())) < 0.5


async def test_a_refused_question_is_an_outage_that_ends_by_itself(
    door: Door, postgres_database: PostgresDatabase
) -> None:
    owner = await asyncpg.connect(postgres_database.admin_dsn)
    try:
        await owner.execute("revoke select on ibex_core.changes from ibex_app")
        run = spawn(door.follower.run(), name="test feed")
        await eventually(lambda: door.follower.postgres_is_away)
        await owner.execute("grant select on ibex_core.changes to ibex_app")
        await eventually(lambda: not door.follower.postgres_is_away)
        run.cancel()
    finally:
        await owner.close()


async def test_a_fault_of_the_feeds_own_ends_neither_the_questions_nor_the_process(
    door: Door, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(_: object) -> Changes:
        raise KeyError("a fault")

    with monkeypatch.context() as patch:
        patch.setattr(feed_module.ChangeFeed, "poll", fail)
        await door.poll()
        assert door.follower.postgres_is_away
        assert "the change feed failed" in caplog.text
    await door.poll()
    assert not door.follower.postgres_is_away
