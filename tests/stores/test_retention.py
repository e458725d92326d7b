"""Retention: what is old goes, from the beginning of its session, and nobody can be told to delete what is young."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from ibex.errors import StoreRefused
from ibex.stores.postgres.pool import Postgres
from ibex.stores.postgres.sessions import Expired, SessionStore
from tests.tenants import Tenant

MONTH = timedelta(days=30)


async def grow_old(owner: Postgres, external_id: str, indexes: list[int], days: float) -> None:
    """Make turns of a session look as if they had been recorded `days` ago."""
    async with owner.transaction() as connection:
        await connection.execute(
            "update ibex_core.checkpoints as c set recorded_at = clock_timestamp() - $3::interval"
            " from ibex_core.sessions as s"
            " where s.session_id = c.session_id and s.external_id = $1 and c.turn_index = any($2::int[])",
            *(external_id, indexes, timedelta(days=days)),
        )


async def remaining(owner: Postgres) -> dict[str, tuple[int, list[int]]]:
    """For each session its turn_count and the indexes that are left of it."""
    async with owner.transaction() as connection:
        rows = await connection.fetch(
            "select s.external_id, s.turn_count,"
            " array_remove(array_agg(c.turn_index order by c.turn_index), null) as indexes"
            " from ibex_core.sessions as s left join ibex_core.checkpoints as c using (session_id)"
            " group by s.session_id"
        )
    return {row["external_id"]: (row["turn_count"], row["indexes"]) for row in rows}


@pytest.fixture
async def sessions(app: Postgres, tenants: tuple[Tenant, Tenant]) -> SessionStore:
    """Two organizations, each with two sessions of four turns."""
    store = SessionStore(app)
    for tenant in tenants:
        for _ in range(4):
            await store.record([tenant.make_turn(f"{name}-{tenant.org_id}") for name in ("old", "long")])
    return store


async def test_old_checkpoints_go_and_indexes_go_on(
    sessions: SessionStore, owner: Postgres, tenants: tuple[Tenant, Tenant]
) -> None:
    ours, theirs = (f"long-{tenant.org_id}" for tenant in tenants)
    await grow_old(owner, ours, [0, 1], 31)
    await grow_old(owner, theirs, [0, 1, 2], 29)
    assert await sessions.expire(MONTH) == Expired(checkpoints=2, sessions=0)
    left = await remaining(owner)
    assert left[ours] == (4, [2, 3])
    assert left[theirs] == (4, [0, 1, 2, 3])
    await sessions.record([tenants[0].make_turn(ours)])
    assert (await remaining(owner))[ours] == (5, [2, 3, 4])
    assert await sessions.expire(MONTH) == Expired(checkpoints=0, sessions=0)


async def test_a_session_of_which_nothing_is_left_goes_too(
    sessions: SessionStore, owner: Postgres, tenants: tuple[Tenant, Tenant]
) -> None:
    gone = f"old-{tenants[0].org_id}"
    await grow_old(owner, gone, [0, 1, 2, 3], 31)
    assert await sessions.expire(MONTH) == Expired(checkpoints=4, sessions=1)
    assert gone not in await remaining(owner)


@pytest.mark.parametrize(
    ("ages", "left"),
    [
        ((31, 29, 33, 0), [1, 2, 3]),
        ((0, 0, 400, 0), [0, 1, 2, 3]),
        ((0, 400, 400, 400), [0, 1, 2, 3]),
        ((31, 400, 0, 400), [2, 3]),
        ((31, 400, 35, 33), []),
    ],
)
@pytest.mark.parametrize("batch", [1, 1000])
async def test_what_remains_is_young_or_follows_what_is_young_whatever_a_clock_that_was_set_back_wrote(
    sessions: SessionStore,
    owner: Postgres,
    tenants: tuple[Tenant, Tenant],
    ages: tuple[int, ...],
    left: list[int],
    batch: int,
) -> None:
    name = f"long-{tenants[0].org_id}"
    for index, days in enumerate(ages):
        await grow_old(owner, name, [index], days)
    while (expired := await sessions.expire(MONTH, batch=batch)) and expired.checkpoints:
        pass
    assert (await remaining(owner)).get(name, (4, []))[1] == left


async def test_what_waits_for_its_elders_keeps_nothing_else_from_going(
    sessions: SessionStore, owner: Postgres, tenants: tuple[Tenant, Tenant]
) -> None:
    for tenant in tenants:
        await grow_old(owner, f"long-{tenant.org_id}", [1, 2, 3], 400)
    await grow_old(owner, f"old-{tenants[0].org_id}", [0, 1, 2, 3], 31)
    assert await sessions.expire(MONTH, batch=4) == Expired(checkpoints=4, sessions=1)


@pytest.mark.parametrize("hours", [-1.1, 1.1])
async def test_clocks_that_disagree_delete_nothing(
    sessions: SessionStore, owner: Postgres, tenants: tuple[Tenant, Tenant], hours: float
) -> None:
    await grow_old(owner, f"old-{tenants[0].org_id}", [0, 1, 2, 3], 31)
    before = await remaining(owner)
    with pytest.raises(StoreRefused, match="clock and this node's are 1:0"):
        await sessions.expire(MONTH, now=datetime.now(UTC) + timedelta(hours=hours))
    assert await remaining(owner) == before
    assert await sessions.expire(MONTH, now=datetime.now(UTC) + timedelta(minutes=50)) == Expired(4, 1)


async def test_batches_are_small(sessions: SessionStore, owner: Postgres, tenants: tuple[Tenant, Tenant]) -> None:
    for tenant in tenants:
        for name in ("old", "long"):
            await grow_old(owner, f"{name}-{tenant.org_id}", [0, 1, 2, 3], 31)
    deleted = []
    while (expired := await sessions.expire(MONTH, batch=3)) and expired.checkpoints:
        deleted.append(expired.checkpoints)
    assert sum(deleted) == 16
    assert max(deleted) <= 4 + 3
    assert len(deleted) >= 4


async def test_a_session_that_a_recorder_holds_is_left_for_later(
    sessions: SessionStore, owner: Postgres, tenants: tuple[Tenant, Tenant]
) -> None:
    name = f"old-{tenants[0].org_id}"
    await grow_old(owner, name, [0, 1, 2, 3], 31)
    async with owner.transaction() as connection:
        await connection.execute("select from ibex_core.sessions where external_id = $1 for update", name)
        assert await sessions.expire(MONTH) == Expired(checkpoints=0, sessions=0, passed_over=1)
    assert await sessions.expire(MONTH) == Expired(checkpoints=4, sessions=1)


async def test_one_node_at_a_time(sessions: SessionStore, owner: Postgres, tenants: tuple[Tenant, Tenant]) -> None:
    for tenant in tenants:
        await grow_old(owner, f"old-{tenant.org_id}", [0, 1, 2, 3], 31)
    async with owner.transaction() as connection:
        await connection.execute("lock table ibex_core.checkpoints in access exclusive mode")
        first = asyncio.ensure_future(sessions.expire(MONTH))
        await asyncio.sleep(0.2)
        assert await sessions.expire(MONTH) is None
    assert await first == Expired(checkpoints=8, sessions=2)


async def test_nothing_younger_than_a_day_can_be_deleted(
    sessions: SessionStore, owner: Postgres, tenants: tuple[Tenant, Tenant]
) -> None:
    await grow_old(owner, f"old-{tenants[0].org_id}", [0, 1, 2, 3], 0.9)
    before = await remaining(owner)
    for age in (timedelta(), timedelta(days=-400)):
        assert await sessions.expire(age) == Expired(checkpoints=0, sessions=0)
    assert await remaining(owner) == before


async def test_no_node_deletes_what_is_younger_than_the_least_age_that_the_owner_set(
    sessions: SessionStore, owner: Postgres, app: Postgres, tenants: tuple[Tenant, Tenant]
) -> None:
    await grow_old(owner, f"old-{tenants[0].org_id}", [0, 1, 2, 3], 31)
    async with owner.transaction() as connection:
        await connection.execute("update ibex_core.retention set least_age = interval '32 days'")
    assert await sessions.expire(timedelta(days=1)) == Expired(checkpoints=0, sessions=0)
    for statement in ("update ibex_core.retention set least_age = '1 day'", "delete from ibex_core.retention"):
        with pytest.raises(StoreRefused, match="InsufficientPrivilege"):
            async with app.transaction() as connection:
                await connection.execute(statement)
    for statement in (
        "update ibex_core.retention set least_age = '1 hour'",
        "insert into ibex_core.retention values (false, '1 day')",
    ):
        with pytest.raises(StoreRefused, match="CheckViolation"):
            async with owner.transaction() as connection:
                await connection.execute(statement)


@pytest.mark.parametrize(
    "statement",
    [
        "delete from ibex_core.checkpoints",
        "delete from ibex_core.sessions",
        "update ibex_core.checkpoints set recorded_at = 'epoch'",
        "update ibex_core.checkpoints set turn_index = turn_index + 9",
        "update ibex_core.checkpoints set messages = null",
        "insert into ibex_core.checkpoints (turn_id, recorded_at) values (gen_random_uuid(), 'epoch')",
        "insert into ibex_core.checkpoints select * from ibex_core.checkpoints",
        "update ibex_core.sessions set created_at = 'epoch'",
        "update ibex_core.sessions set agent_id = gen_random_uuid()",
    ],
)
async def test_the_application_makes_nothing_old_and_deletes_by_age_alone(
    app: Postgres, tenants: tuple[Tenant, Tenant], statement: str
) -> None:
    with pytest.raises(StoreRefused, match="InsufficientPrivilege"):
        async with app.transaction(org_ids=[tenants[0].org_id]) as connection:
            await connection.execute(statement)
