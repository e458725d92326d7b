"""Who is let in: on a first look, from memory, through changes, and while stores are away."""

import asyncio
import gc
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from ibex.domain.identity import DEV_TOKEN, PERMISSION_SETS, AgentId, Permission, mint_token
from ibex.errors import (
    AgentNotAuthorized,
    AgentSuspended,
    InsufficientPermissions,
    InvalidToken,
    MissingAgentId,
    MissingToken,
    OrgSuspended,
    RateLimited,
    RequestError,
    ServiceDegraded,
    UserSuspended,
    ValidationFailed,
)
from ibex.pipeline import authentication, strangers
from ibex.pipeline.authentication import read_bearer
from ibex.pipeline.changes import now
from ibex.pipeline.principals import KNOWN_SECONDS, Entry, decode_fill, encode_fill
from tests.conftest import PostgresDatabase
from tests.pipeline.conftest import Door
from tests.tenants import make_tenant
from tests.waiting import eventually

KNOWN = "192.0.2.7"


def start(coroutine: Any) -> asyncio.Task[Any]:
    return asyncio.get_running_loop().create_task(coroutine)


def entry_of(door: Door) -> Entry | None:
    """What is remembered of the tenant."""
    return next((entry for entry in door.authenticator._cache._entries.values()), None)


async def refused(door: Door, error: type[RequestError], bearer: str | None = None, agent: object = None) -> None:
    with pytest.raises(RequestError) as caught:
        await door.enter(bearer, agent)
    assert type(caught.value) is error


async def test_a_caller_is_read_once_and_then_known_without_any_store(door: Door) -> None:
    first = await door.enter()
    await door.relay.stop()
    second = await door.enter()

    assert (first.was_cached, second.was_cached) == (False, True)
    assert (
        (first.org_id, first.agent_id)
        == (second.org_id, second.agent_id)
        == (
            door.tenant.org_id,
            door.tenant.agent_id,
        )
    )
    assert door.reader.reads.count == 1
    assert door.metrics.auth_cache_hits_total.labels("lru").read() == [1.0]
    assert door.metrics.auth_cache_misses_total.labels("lru").read() == [1.0]


async def test_a_hit_neither_waits_nor_makes_a_task(door: Door) -> None:
    await door.enter()
    tasks = asyncio.all_tasks()
    hit = door.enter()
    with pytest.raises(StopIteration) as end:
        hit.send(None)
    hit.close()

    assert end.value.value.was_cached
    assert asyncio.all_tasks() == tasks


async def test_an_agents_id_is_the_same_in_capitals(door: Door) -> None:
    await door.enter()

    assert (await door.enter(agent=str(door.tenant.agent_id).upper())).was_cached


@pytest.mark.parametrize(
    ("field", "outcome"),
    [
        (None, MissingToken),
        ("", MissingToken),
        ("  ", MissingToken),
        ("Bearer", MissingToken),
        ("bearer  ", MissingToken),
        ("Basic abc", InvalidToken),
        ("abc", InvalidToken),
        ("Bearer abc", "abc"),
        ("bEARER   abc ", "abc"),
    ],
)
def test_the_bearer_is_what_follows_its_scheme(field: str | None, outcome: Any) -> None:
    if isinstance(outcome, str):
        assert read_bearer(field) == outcome
    else:
        with pytest.raises(outcome):
            read_bearer(field)


async def test_a_token_that_is_not_good_is_refused_in_one_way(door: Door) -> None:
    org = door.tenant.org_id
    revoked, revoked_bearer = await door.admin.mint_token(org)
    await door.admin.revoke_token(revoked["token_id"])
    _, expired = await door.admin.mint_token(org, expires_in=timedelta(milliseconds=1))
    await asyncio.sleep(0.01)
    bearers = [
        mint_token().bearer,
        door.tenant.bearer[:-1] + ("A" if door.tenant.bearer[-1] != "A" else "B"),
        revoked_bearer,
        expired,
    ]
    before = door.reader.reads.count
    for bearer in bearers:
        await refused(door, InvalidToken, bearer)
    assert door.reader.reads.count == before + 4

    for bearer in bearers:
        await refused(door, InvalidToken, bearer)
        await refused(door, InvalidToken, bearer, "no-uuid")
    assert door.metrics.auth_cache_hits_total.labels("negative").read() == [4.0]

    for bearer in ("ibex_pat_", "x" * 8192, "ibex_pat_%00_'--", DEV_TOKEN):
        await refused(door, InvalidToken, bearer)


async def test_the_development_token_is_good_where_it_is_accepted_and_seeded(door: Door) -> None:
    door.authenticator._accepts_dev_token = True

    await refused(door, InvalidToken, DEV_TOKEN)


async def test_agents_are_judged_after_the_token(door: Door) -> None:
    other = await make_tenant(door.admin, "other")
    bound_to, paused = [
        (await door.admin.register_agent(door.tenant.org_id, name))["agent_id"] for name in ("bound", "paused")
    ]
    _, bound = await door.admin.mint_token(door.tenant.org_id, agent=AgentId(bound_to))
    await door.admin.set_status("agent", paused, "paused")

    for agent, error in [
        ("", MissingAgentId),
        (f"{{{door.tenant.agent_id}}}", ValidationFailed),
        ("7", ValidationFailed),
        (uuid4(), AgentNotAuthorized),
        (UUID(int=0), AgentNotAuthorized),
        (other.agent_id, AgentNotAuthorized),
        (paused, AgentSuspended),
    ]:
        for _ in range(2):
            await refused(door, error, agent=agent)
    await refused(door, AgentNotAuthorized, bound)
    assert (await door.enter(bound, bound_to)).agent_id == bound_to
    await refused(door, InvalidToken, mint_token().bearer, "7")


@pytest.mark.parametrize(
    ("granted", "needs", "is_refused"),
    [
        (Permission(0), 0, False),
        (Permission(0), 1, True),
        (PERMISSION_SETS["ReadOnly"], None, True),
        (PERMISSION_SETS["ProxyChatCompletion"], None, False),
        (PERMISSION_SETS["Admin"], int(PERMISSION_SETS["Admin"]), False),
        (PERMISSION_SETS["AgentDefault"], int(Permission.TOKEN_CREATE), True),
    ],
)
async def test_permissions_are_asked_for_each_time(
    door: Door, granted: Permission, needs: int | None, is_refused: bool
) -> None:
    _, bearer = await door.admin.mint_token(door.tenant.org_id, permissions=granted)
    wanted = {} if needs is None else {"needs": needs}
    for _ in range(2):
        if is_refused:
            with pytest.raises(InsufficientPermissions):
                await door.enter(bearer, **wanted)
        else:
            assert (await door.enter(bearer, **wanted)).permissions == granted


@pytest.mark.parametrize("way", ["feed", "redis"])
@pytest.mark.parametrize(
    ("kind", "of", "status", "error"),
    [
        ("token", "token_id", None, InvalidToken),
        ("organization", "org_id", "suspended", OrgSuspended),
        ("user", "user_id", "suspended", UserSuspended),
        ("agent", "agent_id", "paused", AgentSuspended),
        ("agent", "agent_id", "archived", AgentSuspended),
    ],
)
async def test_a_change_of_what_a_caller_rests_on_is_in_force_once_heard(
    door: Door, way: str, kind: Any, of: str, status: str | None, error: type[RequestError]
) -> None:
    entity_id = getattr(door.tenant, of)
    await door.enter()
    if way == "redis":
        await door.hear_redis()
    if status is None:
        await door.admin.revoke_token(entity_id)
    else:
        await door.admin.set_status(kind, entity_id, status)
    await (door.poll() if way == "feed" else door.publish(kind, entity_id))

    await refused(door, error)

    assert door.metrics.revocation_invalidate_total.labels().read() == [1.0]
    if status is not None:
        await door.admin.set_status(kind, entity_id, "active")
        await door.poll()
        await door.enter()


async def test_limits_are_known_as_they_are_set(door: Door) -> None:
    assert (await door.enter()).org_rpm is None
    await door.admin.set_limit(door.tenant.org_id, 7)
    await door.admin.set_limit(door.tenant.org_id, 3, door.tenant.agent_id)
    await door.poll()

    principal = await door.enter()

    assert (principal.org_rpm, principal.agent_rpm) == (7, 3)


async def revoke(door: Door) -> None:
    await door.admin.revoke_token(door.tenant.token_id)
    await door.poll()


async def test_a_fill_that_read_before_a_change_never_lands_after_it(door: Door) -> None:
    door.reader.reads.shut()
    fill = start(door.enter())
    await door.reader.reads.reached()
    await revoke(door)
    door.reader.reads.open()

    with pytest.raises(InvalidToken):
        await fill
    assert door.reader.reads.count == 2
    assert entry_of(door) is None


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
    assert entry_of(door) is None


async def test_a_reread_that_read_before_a_change_never_lands_after_it(door: Door) -> None:
    await door.enter()
    entry_of(door).read_at -= 25
    door.reader.rereads.shut()
    reread = start(door.authenticator._rereader.reread_due())
    await door.reader.rereads.reached()
    await revoke(door)
    door.reader.rereads.open()
    await reread

    assert entry_of(door).is_void
    await refused(door, InvalidToken)


async def test_a_neighbours_fill_that_read_before_a_change_does_not_serve(door: Door) -> None:
    await door.enter()
    payload = door.shared.pop()
    await revoke(door)
    await refused(door, InvalidToken)
    door.authenticator.take_shared(payload)

    assert entry_of(door).is_void
    door.authenticator._refusals.forget(None)
    await refused(door, InvalidToken)


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
    entry = entry_of(door)
    fill = decode_fill(door.shared.pop())
    for payload in (encode_fill(fill.credential, fill.read_at - 1), b"", b"\x91\x01", b"junk"):
        door.authenticator.take_shared(payload)
    assert entry_of(door) is entry

    door.authenticator.take_shared(encode_fill(fill.credential, now()))
    assert entry_of(door) is not entry

    door.authenticator._cache.drop(next(iter(door.authenticator._cache._entries)))
    door.authenticator.take_shared(encode_fill(fill.credential, now() - KNOWN_SECONDS - 1))
    assert entry_of(door) is None


async def test_everybody_who_wants_the_same_look_up_shares_it_and_the_strangers_place(door: Door) -> None:
    door.reader.reads.shut()
    entering = [start(door.enter(address=KNOWN)) for _ in range(500)]
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


async def test_what_was_refused_is_looked_up_again_once_it_changes(
    door: Door, postgres_database: PostgresDatabase
) -> None:
    org = door.tenant.org_id
    await revoke(door)
    await refused(door, InvalidToken)
    agent = uuid4()
    _, bearer = await door.admin.mint_token(org)
    await refused(door, AgentNotAuthorized, bearer, agent)
    owner = await asyncpg.connect(postgres_database.admin_dsn)
    try:
        await owner.execute("update ibex_core.tokens set revoked_at = null where token_id = $1", door.tenant.token_id)
        await owner.execute("insert into ibex_core.agents (agent_id, org_id, name) values ($1, $2, 'late')", agent, org)
    finally:
        await owner.close()
    await door.poll()

    await door.enter()
    assert (await door.enter(bearer, agent)).agent_id == agent


async def test_made_up_agents_of_a_good_token_cost_one_look_up_each_and_no_strangers_place(door: Door) -> None:
    await door.enter()
    reads = door.reader.reads.count
    for _ in range(20):
        await refused(door, AgentNotAuthorized, agent=uuid4())
        await refused(door, MissingAgentId, agent="")

    assert door.reader.reads.count == reads + 21
    assert entry_of(door).credential.agent_id == door.tenant.agent_id
    assert len(door.authenticator._cache._entries) == 1


async def test_strangers_run_out_of_places_and_callers_known_good_never_meet_that(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strangers, "LONGEST_WAIT", 0.0)
    await door.enter(address=KNOWN)
    outcomes = await asyncio.gather(
        *(door.enter(mint_token().bearer, address=KNOWN) for _ in range(400)), return_exceptions=True
    )

    assert {type(outcome) for outcome in outcomes} == {InvalidToken, RateLimited}
    limited = next(outcome for outcome in outcomes if isinstance(outcome, RateLimited))
    assert limited.headers == {"Retry-After": "1"}
    assert (await door.enter(address=KNOWN)).was_cached
    await door.admin.set_limit(door.tenant.org_id, 9)
    await door.poll()
    assert (await door.enter(address=KNOWN)).org_rpm == 9
    agent = (await door.admin.register_agent(door.tenant.org_id, "new"))["agent_id"]
    assert (await door.enter(agent=agent, address=KNOWN)).agent_id == agent


async def test_a_wrong_secret_of_a_known_token_is_a_stranger(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strangers, "LONGEST_WAIT", -1.0)
    with pytest.raises(RateLimited):
        await door.enter()
    monkeypatch.setattr(strangers, "LONGEST_WAIT", 1.0)
    await door.enter()
    monkeypatch.setattr(strangers, "LONGEST_WAIT", -1.0)

    with pytest.raises(RateLimited):
        await door.enter(door.tenant.bearer[:-1] + "_")
    await door.enter()


@pytest.mark.parametrize("is_hanging", [False, True])
async def test_a_postgres_outage_stops_nobody_who_is_known_and_lets_nobody_else_in(
    door: Door, is_hanging: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(authentication, "FILL_SECONDS", 0.2)
    door.feed._deadline = 0.2
    await door.hear_redis()
    await door.enter()
    _, stranger = await door.admin.mint_token(door.tenant.org_id)
    if is_hanging:
        door.relay.hold()
    else:
        await door.relay.stop()

    assert (await door.enter()).was_cached
    await refused(door, ServiceDegraded, stranger)
    door.grow_old()
    entry_of(door).read_at -= 600
    assert (await door.enter()).was_cached
    await refused(door, ServiceDegraded, stranger)

    await door.publish("token", door.tenant.token_id)
    await refused(door, ServiceDegraded)


async def test_hearing_neither_store_stops_everybody(door: Door) -> None:
    await door.enter()
    await door.lose_postgres()

    await refused(door, ServiceDegraded)


async def test_a_loop_that_stood_still_hears_what_it_missed_before_it_serves(door: Door) -> None:
    await door.enter()
    await door.admin.revoke_token(door.tenant.token_id)
    door.grow_old()

    await refused(door, InvalidToken)


async def test_a_read_that_postgres_refuses_cannot_be_checked(door: Door, postgres_database: PostgresDatabase) -> None:
    owner = await asyncpg.connect(postgres_database.admin_dsn)
    await owner.execute("revoke select on ibex_core.tokens from ibex_app")
    await owner.close()

    await refused(door, ServiceDegraded)


async def test_no_entry_outlives_its_token(door: Door) -> None:
    row, bearer = await door.admin.mint_token(door.tenant.org_id, expires_in=timedelta(seconds=0.4))
    await door.enter(bearer)
    assert (await door.enter(bearer)).was_cached
    entry = door.authenticator._cache.due_for_reread(now() + 25)
    assert [one.credential.token_id for _, one in entry] == [row["token_id"]]
    await asyncio.sleep(0.5)
    reads = door.reader.reads.count

    await refused(door, InvalidToken, bearer)
    assert door.reader.reads.count == reads + 1, "an expired token takes the time of any other that is refused"


async def test_an_expired_token_is_not_told_apart_while_postgres_is_away(door: Door) -> None:
    await door.hear_redis()
    await door.enter()
    entry_of(door).expires_at = now()
    await door.lose_postgres()

    await refused(door, ServiceDegraded)


def spoil(entry: Entry) -> None:
    entry.is_void = True


def age(entry: Entry) -> None:
    entry.read_at -= 21


@pytest.mark.parametrize("change", [spoil, age])
async def test_entries_in_use_are_read_again_before_they_are_old(door: Door, change: Callable[[Entry], None]) -> None:
    await door.enter()
    entry = entry_of(door)
    await door.authenticator._rereader.reread_due()
    assert door.reader.rereads.count == 0
    change(entry)
    before = now()

    await door.authenticator._rereader.reread_due()

    assert entry_of(door).read_at >= before
    assert entry_of(door).used_at == entry.used_at
    await door.relay.stop()
    assert (await door.enter()).was_cached


async def test_a_reread_finds_what_no_feed_has_told(door: Door) -> None:
    await door.enter()
    age(entry_of(door))
    await door.admin.revoke_token(door.tenant.token_id)

    await door.authenticator._rereader.reread_due()

    assert entry_of(door) is None
    await refused(door, InvalidToken)


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
    entry = entry_of(door)
    age(entry)
    await door.lose_postgres()

    await door.authenticator._rereader.reread_due()

    assert entry_of(door) is entry


async def test_the_rereads_outlive_a_refusal(
    door: Door, postgres_database: PostgresDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ibex.pipeline.rereading.PAUSE_SECONDS", 0.02)
    await door.enter()
    age(entry_of(door))
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
    entry_of(door).used_at -= KNOWN_SECONDS + 1

    assert not (await door.enter()).was_cached
    entry_of(door).used_at -= KNOWN_SECONDS + 1
    await door.authenticator._rereader.reread_due()
    assert entry_of(door) is None


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
        age(entry_of(door))
        await door.authenticator._rereader.reread_due()
        assert len(door.shared) == 1
    noted = await last_used()
    assert noted is not None

    entry_of(door).used_at -= 62
    entry_of(door).told_at -= 61
    age(entry_of(door))
    await door.authenticator._rereader.reread_due()
    assert len(door.shared) == 1, "not used since"


async def test_the_cache_is_bounded(door: Door) -> None:
    door.authenticator._cache._size = 2
    bearers = [(await door.admin.mint_token(door.tenant.org_id))[1] for _ in range(3)]
    for bearer in bearers:
        await door.enter(bearer)

    assert door.metrics.auth_cache_lru_size.labels().read() == [2.0]
    assert door.metrics.auth_cache_lru_evictions_total.labels().read() == [1.0]
    assert (await door.enter(bearers[2])).was_cached
    assert not (await door.enter(bearers[0])).was_cached
