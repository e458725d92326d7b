"""Who is let in: on a first look, from memory, through changes, and while stores are away."""

import asyncio
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from ibex.domain.identity import DEV_AGENT_ID, DEV_ORG_ID, DEV_TOKEN, PERMISSION_SETS, AgentId, Permission, mint_token
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
from ibex.stores.postgres import changes
from ibex.stores.postgres.schema import seed_development
from tests.conftest import PostgresDatabase
from tests.pipeline.conftest import Door
from tests.tenants import make_tenant

KNOWN = "192.0.2.7"


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
        await door.refuse(InvalidToken, bearer)
    assert door.reader.reads.count == before + 4

    for bearer in bearers:
        await door.refuse(InvalidToken, bearer)
        await door.refuse(InvalidToken, bearer, "no-uuid")
    assert door.metrics.auth_cache_hits_total.labels("negative").read() == [4.0]

    for bearer in ("ibex_pat_", "x" * 8192, "ibex_pat_%00_'--", DEV_TOKEN):
        await door.refuse(InvalidToken, bearer)


async def test_the_development_token_is_good_only_where_it_is_seeded_and_accepted(
    door: Door, postgres_database: PostgresDatabase
) -> None:
    door.authenticator._accepts_dev_token = True
    await door.refuse(InvalidToken, DEV_TOKEN, DEV_AGENT_ID)
    await seed_development(postgres_database.admin_dsn)
    await door.poll()
    assert (await door.enter(DEV_TOKEN, DEV_AGENT_ID)).org_id == DEV_ORG_ID
    door.authenticator._cache.drop(next(iter(door.authenticator._cache._entries)))
    door.authenticator._accepts_dev_token = False
    await door.refuse(InvalidToken, DEV_TOKEN, DEV_AGENT_ID)


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
            await door.refuse(error, agent=agent)
    await door.refuse(AgentNotAuthorized, bound)
    assert (await door.enter(bound, bound_to)).agent_id == bound_to
    await door.refuse(InvalidToken, mint_token().bearer, "7")


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

    await door.refuse(error)

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


async def test_what_was_refused_is_looked_up_again_once_it_changes(
    door: Door, postgres_database: PostgresDatabase
) -> None:
    org = door.tenant.org_id
    await door.revoke()
    await door.refuse(InvalidToken)
    agent = uuid4()
    _, bearer = await door.admin.mint_token(org)
    await door.refuse(AgentNotAuthorized, bearer, agent)
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
        await door.refuse(AgentNotAuthorized, agent=uuid4())
        await door.refuse(MissingAgentId, agent="")

    assert door.reader.reads.count == reads + 21
    assert door.entry.credential.agent_id == door.tenant.agent_id
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
    assert list(door.authenticator._gate._buckets) == [KNOWN, str(door.tenant.token_id)]


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
    await door.refuse(ServiceDegraded, stranger)
    door.grow_old()
    door.entry.read_at -= 600
    assert (await door.enter()).was_cached
    await door.refuse(ServiceDegraded, stranger)

    await door.publish("token", door.tenant.token_id)
    await door.refuse(ServiceDegraded)


async def test_hearing_neither_store_stops_everybody(door: Door) -> None:
    await door.enter()
    await door.lose_postgres()

    await door.refuse(ServiceDegraded)


async def test_nobody_is_let_in_on_the_word_of_a_server_whose_changes_are_not_heard(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    await door.hear_redis()
    monkeypatch.setattr(changes, "_POLL", changes._POLL.replace("pg_is_in_recovery()", "true"))
    door.grow_old()

    await door.refuse(ServiceDegraded)
    assert door.reader.reads.count == 0


async def test_a_loop_that_stood_still_hears_what_it_missed_before_it_serves(door: Door) -> None:
    await door.enter()
    await door.admin.revoke_token(door.tenant.token_id)
    door.grow_old()

    await door.refuse(InvalidToken)


async def test_a_read_that_postgres_refuses_cannot_be_checked(door: Door, postgres_database: PostgresDatabase) -> None:
    owner = await asyncpg.connect(postgres_database.admin_dsn)
    await owner.execute("revoke select on ibex_core.tokens from ibex_app")
    await owner.close()

    await door.refuse(ServiceDegraded)


async def test_no_entry_outlives_its_token(door: Door) -> None:
    row, bearer = await door.admin.mint_token(door.tenant.org_id, expires_in=timedelta(seconds=0.4))
    await door.enter(bearer)
    assert (await door.enter(bearer)).was_cached
    entry = door.authenticator._cache.due_for_reread(now() + 25)
    assert [one.credential.token_id for _, one in entry] == [row["token_id"]]
    await asyncio.sleep(0.5)
    reads = door.reader.reads.count

    await door.refuse(InvalidToken, bearer)
    assert door.reader.reads.count == reads + 1, "an expired token takes the time of any other that is refused"


async def test_an_expired_token_is_not_told_apart_while_postgres_is_away(door: Door) -> None:
    await door.hear_redis()
    await door.enter()
    door.entry.expires_at = now()
    await door.lose_postgres()

    await door.refuse(ServiceDegraded)


async def test_the_cache_is_bounded(door: Door) -> None:
    door.authenticator._cache._size = 2
    bearers = [(await door.admin.mint_token(door.tenant.org_id))[1] for _ in range(3)]
    for bearer in bearers:
        await door.enter(bearer)

    assert door.metrics.auth_cache_lru_size.labels().read() == [2.0]
    assert door.metrics.auth_cache_lru_evictions_total.labels().read() == [1.0]
    assert (await door.enter(bearers[2])).was_cached
    assert not (await door.enter(bearers[0])).was_cached
