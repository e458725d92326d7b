"""What is read of a caller, by this worker or by another: shared by all who wait, and never older than a change."""

import asyncio
import gc
from typing import Any

import pytest

from ibex.errors import (
    InvalidToken,
    ServiceDegraded,
)
from ibex.pipeline.changes import now
from ibex.pipeline.principals import KNOWN_SECONDS, decode_fill, encode_fill
from tests.pipeline.conftest import Door
from tests.waiting import eventually


def start(coroutine: Any) -> asyncio.Task[Any]:
    return asyncio.get_running_loop().create_task(coroutine)


async def test_a_fill_that_read_before_a_change_never_lands_after_it(door: Door) -> None:
    door.reader.reads.shut()
    fill = start(door.enter())
    await door.reader.reads.reached()
    await door.revoke()
    door.reader.reads.open()

    with pytest.raises(InvalidToken):
        await fill
    assert door.reader.reads.count == 2
    assert door.entry is None


async def test_a_fill_that_read_before_a_reset_is_read_again(door: Door) -> None:
    door.reader.reads.shut()
    fill = start(door.enter())
    await door.reader.reads.reached()
    door.follower._reset()
    door.reader.reads.open()

    assert (await fill).org_id == door.tenant.org_id
    assert door.reader.reads.count == 2


async def test_what_keeps_changing_while_it_is_read_cannot_be_checked(door: Door) -> None:
    door.reader.reads.shut()
    fill = start(door.enter())
    for count in (1, 2, 3):
        await door.reader.reads.reached(count)
        door.follower.take("organization", door.tenant.org_id)
        door.reader.reads.open()
        door.reader.reads.shut()

    with pytest.raises(ServiceDegraded):
        await fill
    assert door.entry is None


async def test_a_neighbours_fill_that_read_before_a_change_does_not_serve(door: Door) -> None:
    await door.enter()
    payload = door.shared.pop()
    await door.revoke()
    await door.refuse(InvalidToken)
    door.authenticator.take_shared(payload)

    assert door.entry.is_void
    door.authenticator._refusals.forget(None)
    await door.refuse(InvalidToken)


async def test_a_neighbours_fill_is_as_good_as_ones_own(door: Door) -> None:
    await door.enter()
    payload = door.shared.pop()
    door.authenticator._cache.drop(next(iter(door.authenticator._cache._entries)))
    door.authenticator.take_shared(payload)
    await door.relay.stop()

    assert (await door.enter()).was_cached
    assert door.tenant.bearer.encode() not in payload


async def test_a_neighbours_fill_replaces_nothing_newer_and_what_is_unreadable_is_left(door: Door) -> None:
    await door.enter()
    entry = door.entry
    fill = decode_fill(door.shared.pop())
    for payload in (encode_fill(fill.credential, fill.read_at - 1), b"", b"\x91\x01", b"junk"):
        door.authenticator.take_shared(payload)
    assert door.entry is entry

    door.authenticator.take_shared(encode_fill(fill.credential, now()))
    assert door.entry is not entry

    door.authenticator._cache.drop(next(iter(door.authenticator._cache._entries)))
    door.authenticator.take_shared(encode_fill(fill.credential, now() - KNOWN_SECONDS - 1))
    assert door.entry is None


async def test_everybody_who_wants_the_same_look_up_shares_it_and_the_strangers_place(door: Door) -> None:
    door.reader.reads.shut()
    entering = [start(door.enter(address="192.0.2.7")) for _ in range(500)]
    await door.reader.reads.reached()
    door.reader.reads.open()

    assert {principal.org_id for principal in await asyncio.gather(*entering)} == {door.tenant.org_id}
    assert door.reader.reads.count == 1


async def test_a_client_that_hangs_up_stops_the_look_up_for_nobody(door: Door) -> None:
    door.reader.reads.shut()
    first, second = start(door.enter()), start(door.enter())
    await door.reader.reads.reached()
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    door.reader.reads.open()

    assert (await second).org_id == door.tenant.org_id
    assert door.reader.reads.count == 1


async def test_a_look_up_that_fails_with_nobody_left_to_tell_is_not_reported_as_lost(door: Door) -> None:
    lost: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: lost.append(context))
    door.relay.hold()
    fill = start(door.enter())
    await asyncio.sleep(0.05)
    fill.cancel()
    await asyncio.gather(fill, return_exceptions=True)
    await door.relay.stop()
    await eventually(lambda: all(task.get_name() != "credential fill" for task in asyncio.all_tasks()))
    del fill  # its traceback holds the look-up
    gc.collect()

    assert lost == []
