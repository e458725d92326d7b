"""Which directive is in force: never an old one where a new one could be known, and never silently none."""

import asyncio

import asyncpg
import pytest

from ibex.domain.directives import DirectiveMode
from ibex.domain.identity import Principal
from ibex.errors import ServiceDegraded
from ibex.pipeline import directives
from tests.conftest import PostgresDatabase
from tests.pipeline.conftest import Door
from tests.tenants import make_tenant


@pytest.fixture
async def caller(door: Door) -> Principal:
    return await door.enter()


async def text_of(door: Door, caller: Principal) -> str | None:
    directive = await door.book.in_force(caller)
    return None if directive is None else directive.text


async def test_what_is_in_force_is_read_once_and_then_known_without_waiting(door: Door, caller: Principal) -> None:
    version = await door.directives.set(caller.agent_id, "Be brief.", DirectiveMode.USER_PREPEND)
    first = await door.book.in_force(caller)
    assert first is not None
    assert (first.version, first.text, first.mode) == (version, "Be brief.", DirectiveMode.USER_PREPEND)
    await door.relay.stop()

    hit = door.book.in_force(caller)
    with pytest.raises(StopIteration) as end:
        hit.send(None)
    assert end.value.value == first
    assert door.directive_reader.reads.count == 1
    assert door.metrics.directive_cache_hits_total.labels().read() == [1.0]
    assert door.metrics.directive_cache_misses_total.labels().read() == [1.0]


async def test_an_agent_without_one_is_known_to_have_none(door: Door, caller: Principal) -> None:
    assert await text_of(door, caller) is None
    await door.relay.stop()
    assert await text_of(door, caller) is None


@pytest.mark.parametrize("way", ["feed", "redis"])
async def test_each_change_is_in_force_once_heard(door: Door, caller: Principal, way: str) -> None:
    if way == "redis":
        await door.hear_redis()

    async def hear() -> None:
        await (door.poll() if way == "feed" else door.publish("directive", caller.agent_id))

    assert await text_of(door, caller) is None
    await door.directives.set(caller.agent_id, "One.")
    await hear()
    assert await text_of(door, caller) == "One."
    await door.directives.set(caller.agent_id, "Two.")
    await hear()
    assert await text_of(door, caller) == "Two."
    await door.directives.roll_back(caller.agent_id, 1)
    await hear()
    assert await text_of(door, caller) == "One."
    await door.directives.clear(caller.agent_id)
    await hear()
    assert await text_of(door, caller) is None
    assert door.metrics.directive_invalidate_total.labels().read() == [4.0]


async def test_a_change_touches_its_own_agent_and_a_reset_everybody(door: Door, caller: Principal) -> None:
    other = await make_tenant(door.admin, "other")
    their = await door.enter(other.bearer, other.agent_id)
    for principal in (caller, their):
        await door.book.in_force(principal)
    await door.directives.set(other.agent_id, "Theirs.")
    await door.poll()
    assert (await text_of(door, caller), await text_of(door, their)) == (None, "Theirs.")
    assert door.directive_reader.reads.count == 3
    door.follower._reset()
    await text_of(door, caller)
    await text_of(door, their)
    assert door.directive_reader.reads.count == 5


async def test_a_read_from_before_a_change_never_lands_after_it(door: Door, caller: Principal) -> None:
    door.directive_reader.reads.shut()
    reading = asyncio.get_running_loop().create_task(text_of(door, caller))
    await door.directive_reader.reads.reached()
    await door.directives.set(caller.agent_id, "New.")
    await door.poll()
    door.directive_reader.reads.open()

    assert await reading == "New."
    assert await text_of(door, caller) == "New."
    assert door.directive_reader.reads.count == 2


async def test_what_keeps_changing_is_used_as_last_read_and_not_remembered(door: Door, caller: Principal) -> None:
    door.directive_reader.reads.shut()
    reading = asyncio.get_running_loop().create_task(text_of(door, caller))
    for count in (1, 2, 3):
        await door.directive_reader.reads.reached(count)
        await door.directives.set(caller.agent_id, f"Version {count}.")
        await door.poll()
        door.directive_reader.reads.open()
        door.directive_reader.reads.shut()

    assert await reading == "Version 2."
    door.directive_reader.reads.open()
    assert await text_of(door, caller) == "Version 3."


async def test_all_who_wait_share_one_read_and_who_hangs_up_stops_it_for_nobody(door: Door, caller: Principal) -> None:
    await door.directives.set(caller.agent_id, "One.")
    door.directive_reader.reads.shut()
    first, *others = [asyncio.get_running_loop().create_task(text_of(door, caller)) for _ in range(20)]
    await door.directive_reader.reads.reached()
    first.cancel()
    door.directive_reader.reads.open()

    assert await asyncio.gather(*others) == ["One."] * 19
    assert door.directive_reader.reads.count == 1


async def test_a_loop_that_stood_still_hears_what_it_missed_first(door: Door, caller: Principal) -> None:
    assert await text_of(door, caller) is None
    await door.directives.set(caller.agent_id, "One.")
    door.grow_old()

    assert await text_of(door, caller) == "One."


@pytest.mark.parametrize("is_hanging", [False, True])
async def test_while_postgres_is_away_the_last_known_version_is_used_and_the_unknown_is_refused(
    door: Door, caller: Principal, is_hanging: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directives, "READ_SECONDS", 0.2)
    door.feed._deadline = 0.2
    other = await make_tenant(door.admin, "other")
    their = await door.enter(other.bearer, other.agent_id)
    await door.directives.set(caller.agent_id, "One.")
    await door.hear_redis()
    assert await text_of(door, caller) == "One."
    await door.directives.set(caller.agent_id, "Two.")
    if is_hanging:
        door.relay.hold()
    else:
        await door.relay.stop()
    await door.publish("directive", caller.agent_id)

    for _ in range(2):
        assert await text_of(door, caller) == "One."
        with pytest.raises(ServiceDegraded) as refusal:
            await door.book.in_force(their)
        assert refusal.value.headers == {"Retry-After": "1"}
        door.grow_old()
    reads = door.metrics.directive_resolve_errors_total.labels().read()
    assert reads[0] >= 2.0

    door.relay.release()
    if not is_hanging:
        await door.relay.start()
    door.feed._deadline = 5.0
    await door.poll()
    assert await text_of(door, caller) == "Two."
    assert await text_of(door, their) is None


async def test_a_read_that_postgres_refuses_is_never_silently_none(
    door: Door, caller: Principal, postgres_database: PostgresDatabase
) -> None:
    owner = await asyncpg.connect(postgres_database.admin_dsn)
    await owner.execute("revoke select on ibex_core.directives from ibex_app")
    await owner.close()

    with pytest.raises(ServiceDegraded):
        await door.book.in_force(caller)


async def test_memory_is_bounded_and_those_in_use_stay(
    door: Door, caller: Principal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directives, "MOST_BYTES", 100_000)
    await door.directives.set(caller.agent_id, "Mine.")
    await door.book.in_force(caller)
    for number in range(5):
        other = await make_tenant(door.admin, f"other {number}")
        await door.directives.set(other.agent_id, "x" * 30_000)
        await door.poll()
        await door.book.in_force(await door.enter(other.bearer, other.agent_id))
        await door.book.in_force(caller)

    assert caller.agent_id in door.book._known
    assert len(door.book._known) == 4
    assert door.book._bytes == sum(known.size for known in door.book._known.values()) <= 100_000
    monkeypatch.setattr(directives, "MOST_AGENTS", 1)
    door.follower._reset()
    await door.book.in_force(caller)
    assert list(door.book._known) == [caller.agent_id]
