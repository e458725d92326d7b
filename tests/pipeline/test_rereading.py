"""Reading again what is remembered, in the background."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import asyncpg
import pytest

from ibex.errors import (
    InvalidToken,
)
from ibex.pipeline import rereading
from ibex.pipeline.changes import now
from ibex.pipeline.principals import KNOWN_SECONDS, Entry, decode_fill, encode_fill
from ibex.telemetry import spawn
from tests.conftest import PostgresDatabase
from tests.pipeline.conftest import Door
from tests.waiting import eventually


def start(coroutine: Any) -> asyncio.Task[Any]:
    return asyncio.get_running_loop().create_task(coroutine)


def spoil(entry: Entry) -> None:
    entry.is_void = True


def age(entry: Entry) -> None:
    entry.read_at -= 21


@pytest.mark.parametrize("change", [spoil, age])
async def test_entries_in_use_are_read_again_before_they_are_old(door: Door, change: Callable[[Entry], None]) -> None:
    await door.enter()
    entry = door.entry
    await door.authenticator._rereader.reread_due()
    assert door.reader.rereads.count == 0
    change(entry)
    before = now()

    await door.authenticator._rereader.reread_due()

    assert door.entry.read_at >= before
    assert door.entry.used_at == entry.used_at
    await door.relay.stop()
    assert (await door.enter()).was_cached


async def test_after_a_reset_everybody_is_read_again_at_once(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rereading, "PAUSE_SECONDS", 3600)
    await door.enter()
    door.tasks.append(spawn(door.authenticator.reread_forever(), name="test rereads"))
    await asyncio.sleep(0)
    assert door.feed._position is not None
    door.feed._position = replace(door.feed._position, timeline="another server")

    await door.poll()

    assert door.entry.is_void
    await eventually(lambda: not door.entry.is_void)


async def test_whom_a_new_worker_is_told_of_is_read_again_at_once(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rereading, "PAUSE_SECONDS", 3600)
    await door.enter()
    told = decode_fill(door.shared.pop())
    door.authenticator._cache.drop(next(iter(door.authenticator._cache._entries)))
    door.tasks.append(spawn(door.authenticator.reread_forever(), name="test rereads"))
    await asyncio.sleep(0)

    door.authenticator.take_shared(encode_fill(told.credential, door.follower._reset_at - 1))

    assert door.entry.is_void
    await eventually(lambda: not door.entry.is_void)


async def test_a_reread_that_read_before_a_change_never_lands_after_it(door: Door) -> None:
    await door.enter()
    door.entry.read_at -= 25
    door.reader.rereads.shut()
    reread = start(door.authenticator._rereader.reread_due())
    await door.reader.rereads.reached()
    await door.revoke()
    door.reader.rereads.open()
    await reread

    assert door.entry.is_void
    await door.refuse(InvalidToken)


async def test_a_reread_finds_what_no_feed_has_told(door: Door) -> None:
    await door.enter()
    age(door.entry)
    await door.admin.revoke_token(door.tenant.token_id)

    await door.authenticator._rereader.reread_due()

    assert door.entry is None
    await door.refuse(InvalidToken)


async def test_rereads_bring_nothing_back_and_leave_the_order_of_use(door: Door) -> None:
    tokens = [(await door.admin.mint_token(door.tenant.org_id))[1] for _ in range(3)]
    for bearer in tokens:
        await door.enter(bearer)
    cache = door.authenticator._cache
    first, second, third = cache._entries
    for key in (first, second):
        age(cache._entries[key])
    door.reader.rereads.shut()
    reread = start(door.authenticator._rereader.reread_due())
    await door.reader.rereads.reached()
    cache.drop(second)
    door.reader.rereads.open()
    await reread

    assert list(cache._entries) == [first, third]


async def test_while_postgres_is_away_entries_stay_as_they_are(door: Door) -> None:
    await door.enter()
    entry = door.entry
    age(entry)
    await door.lose_postgres()

    await door.authenticator._rereader.reread_due()

    assert door.entry is entry


async def test_the_rereads_outlive_a_refusal(
    door: Door, postgres_database: PostgresDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ibex.pipeline.rereading.PAUSE_SECONDS", 0.02)
    await door.enter()
    age(door.entry)
    owner = await asyncpg.connect(postgres_database.admin_dsn)
    await owner.execute("revoke select on ibex_core.tokens from ibex_app")
    door.tasks.append(start(door.authenticator.reread_forever()))
    await asyncio.sleep(0.1)
    assert door.authenticator._rereader._is_failing
    await owner.execute("grant select on ibex_core.tokens to ibex_app")
    await owner.close()

    await door.reader.rereads.reached()


async def test_who_is_not_seen_for_a_quarter_of_an_hour_is_no_longer_known(door: Door) -> None:
    await door.enter()
    door.entry.used_at -= KNOWN_SECONDS + 1

    assert not (await door.enter()).was_cached
    door.entry.used_at -= KNOWN_SECONDS + 1
    await door.authenticator._rereader.reread_due()
    assert door.entry is None


async def test_use_is_told_to_the_neighbours_and_noted_in_postgres_once_a_minute(
    door: Door, postgres_database: PostgresDatabase
) -> None:
    async def last_used() -> Any:
        owner = await asyncpg.connect(postgres_database.admin_dsn)
        try:
            return await owner.fetchval(
                "select last_used_at from ibex_core.tokens where token_id = $1", door.tenant.token_id
            )
        finally:
            await owner.close()

    await door.enter()
    door.shared.clear()
    for _ in range(2):
        age(door.entry)
        await door.authenticator._rereader.reread_due()
        assert len(door.shared) == 1
    noted = await last_used()
    assert noted is not None

    door.entry.used_at -= 62
    door.entry.told_at -= 61
    age(door.entry)
    await door.authenticator._rereader.reread_due()
    assert len(door.shared) == 1, "not used since"
