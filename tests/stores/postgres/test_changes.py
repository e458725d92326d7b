"""The change feed: everything that committed, once, whatever else is open, and never an answer that is not one."""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from uuid import UUID, uuid4

import asyncpg
import pytest

from ibex.errors import StoreUnavailable
from ibex.stores.postgres import changes
from ibex.stores.postgres.changes import ChangeFeed, prune_changes
from ibex.stores.postgres.identity_admin import IdentityAdmin
from ibex.stores.postgres.pool import Postgres
from tests.conftest import PostgresDatabase
from tests.relays import Relay, relayed
from tests.tenants import Tenant

NOTE = "insert into ibex_core.changes (kind, entity_id) values ('token', $1)"


@pytest.fixture
async def feed(postgres_database: PostgresDatabase) -> AsyncIterator[ChangeFeed]:
    """A feed that has had its first answer."""
    feed = ChangeFeed(postgres_database.dsn, deadline=10)
    assert (await feed.poll()).is_reset
    yield feed
    await feed.close()


@pytest.fixture
async def relay(postgres_database: PostgresDatabase) -> AsyncIterator[Relay]:
    """A way to the database that can be cut or held."""
    async with relayed(postgres_database.dsn) as relay:
        yield relay


async def ids(feed: ChangeFeed) -> list[UUID]:
    """What the next answer tells of."""
    changes = await feed.poll()
    assert not changes.is_reset
    return [change.entity_id for change in changes.rows]


async def test_the_first_answer_is_a_reset_and_the_next_tells_what_committed_since(
    postgres_database: PostgresDatabase, tenant: Tenant, admin: IdentityAdmin
) -> None:
    feed = ChangeFeed(postgres_database.dsn, deadline=10)
    first = await feed.poll()
    assert (first.is_reset, first.is_standby, first.rows) == (True, False, ())
    assert await ids(feed) == []
    await admin.revoke_token(tenant.token_id)
    await admin.set_limit(tenant.org_id, 7, tenant.agent_id)
    changes = await feed.poll()
    assert [(change.kind, change.entity_id) for change in changes.rows] == [
        ("token", tenant.token_id),
        ("limit", tenant.agent_id),
    ]
    assert await ids(feed) == []
    await feed.close()


async def test_a_transaction_that_commits_late_is_not_missed(
    feed: ChangeFeed, postgres_database: PostgresDatabase
) -> None:
    slow = await asyncpg.connect(postgres_database.admin_dsn)
    quick = await asyncpg.connect(postgres_database.admin_dsn)
    try:
        late, soon, sooner = uuid4(), uuid4(), uuid4()
        transaction = slow.transaction()
        await transaction.start()
        await slow.execute(NOTE, late)
        await quick.execute(NOTE, soon)
        assert await ids(feed) == [soon]
        await quick.execute(NOTE, sooner)
        assert await ids(feed) == [sooner]
        assert await ids(feed) == []
        await transaction.commit()
        assert await ids(feed) == [late]
        assert await ids(feed) == []
    finally:
        await slow.close()
        await quick.close()


async def test_nothing_is_missed_or_told_twice_among_many_writers(
    feed: ChangeFeed, postgres_database: PostgresDatabase
) -> None:
    committed: list[UUID] = []
    told: list[UUID] = []
    dice = random.Random(7)

    async def write_some() -> None:
        connection = await asyncpg.connect(postgres_database.admin_dsn)
        for _ in range(25):
            transaction = connection.transaction()
            await transaction.start()
            noted = [uuid4() for _ in range(dice.randint(1, 3))]
            for entity_id in noted:
                await connection.execute(NOTE, entity_id)
                await asyncio.sleep(dice.choice((0, 0, 0.001, 0.03)))
            if dice.random() < 0.3:
                await transaction.rollback()
            else:
                await transaction.commit()
                committed.extend(noted)
        await connection.close()

    writers = asyncio.gather(*(write_some() for _ in range(8)))
    while not writers.done():
        told += await ids(feed)
    await writers
    told += await ids(feed)
    assert len(committed) > 200
    assert sorted(told) == sorted(committed)


async def test_a_cursor_ahead_of_the_server_is_a_reset(feed: ChangeFeed, tenant: Tenant) -> None:
    assert tenant.token_id in await ids(feed)
    position = feed._position
    assert position is not None
    assert position.newest is not None
    ahead = position.newest._replace(xid=position.newest.xid + 1_000_000)
    feed._position = replace(position, xmin=position.xmin + 1_000_000, newest=ahead)
    assert (await feed.poll()).is_reset
    assert await ids(feed) == []


async def test_another_timeline_is_a_reset(feed: ChangeFeed) -> None:
    assert feed._position is not None
    feed._position = replace(feed._position, timeline="0000FFFF")
    assert (await feed.poll()).is_reset
    assert await ids(feed) == []


async def test_a_server_that_has_lost_the_newest_change_is_a_reset(
    feed: ChangeFeed, postgres_database: PostgresDatabase, tenant: Tenant, admin: IdentityAdmin
) -> None:
    await admin.revoke_token(tenant.token_id)
    assert (await ids(feed))[-1] == tenant.token_id
    connection = await asyncpg.connect(postgres_database.admin_dsn)
    try:
        lost = await connection.fetchrow(
            "delete from ibex_core.changes where change_id = (select max(change_id) from ibex_core.changes)"
            " returning change_id, xid::text as xid"
        )
        assert lost is not None
        # As after a crash without synchronous commits, or on a copy: another change by the same ids.
        await connection.execute(
            "insert into ibex_core.changes (change_id, xid, kind, entity_id) overriding system value"
            " values ($1, $2::text::xid8, 'token', gen_random_uuid())",
            lost["change_id"],
            lost["xid"],
        )
    finally:
        await connection.close()
    assert (await feed.poll()).is_reset
    assert await ids(feed) == []


@pytest.mark.parametrize(("hours", "is_reset"), [(46, True), (49, False)])
async def test_a_newest_change_that_may_have_been_pruned_is_not_missed(
    feed: ChangeFeed, postgres_database: PostgresDatabase, hours: int, is_reset: bool
) -> None:
    connection = await asyncpg.connect(postgres_database.admin_dsn)
    try:
        await connection.execute(
            "insert into ibex_core.changes (kind, entity_id, changed_at)"
            " values ('token', gen_random_uuid(), now() - $1 * interval '1 hour')",
            hours,
        )
        assert len(await ids(feed)) == 1
        await connection.execute("delete from ibex_core.changes")
    finally:
        await connection.close()
    assert (await feed.poll()).is_reset is is_reset
    assert await ids(feed) == []


async def test_a_day_without_an_answer_is_a_reset(feed: ChangeFeed) -> None:
    feed._answered_at -= 24 * 3600 - 60
    assert await ids(feed) == []
    feed._answered_at -= 24 * 3600 + 1
    assert (await feed.poll()).is_reset
    assert await ids(feed) == []


async def test_an_answer_of_a_standby_is_marked_and_moves_nothing(
    feed: ChangeFeed, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(changes, "_POLL", changes._POLL.replace("pg_is_in_recovery()", "true"))
        answer = await feed.poll()
    assert (answer.is_standby, answer.is_reset, answer.rows) == (True, False, ())
    assert tenant.token_id in await ids(feed)


async def test_what_was_missed_while_cut_off_is_told_afterwards(
    relay: Relay, tenant: Tenant, admin: IdentityAdmin
) -> None:
    feed = ChangeFeed(relay.dsn, deadline=5)
    await feed.poll()
    await relay.stop()
    with pytest.raises(StoreUnavailable):
        await feed.poll()
    await admin.revoke_token(tenant.token_id)
    with pytest.raises(StoreUnavailable):
        await feed.poll()
    await relay.start()
    assert await ids(feed) == [tenant.token_id]
    await feed.close()


@pytest.mark.parametrize("is_connected", [True, False])
async def test_a_server_that_hangs_costs_the_deadline(
    is_connected: bool, relay: Relay, tenant: Tenant, admin: IdentityAdmin
) -> None:
    feed = ChangeFeed(relay.dsn, deadline=0.3)
    await feed.poll()
    if not is_connected:
        await feed.close()
    relay.hold()
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match="in time"):
        await feed.poll()
    assert time.monotonic() - began < 5
    await admin.revoke_token(tenant.token_id)
    relay.release()
    feed._deadline = 10
    assert await ids(feed) == [tenant.token_id]
    await feed.close()


async def test_a_poll_that_is_cancelled_does_not_spoil_the_next(
    relay: Relay, tenant: Tenant, admin: IdentityAdmin
) -> None:
    feed = ChangeFeed(relay.dsn, deadline=10)
    await feed.poll()
    relay.hold()
    poll = asyncio.get_running_loop().create_task(feed.poll())
    await asyncio.sleep(0.05)
    poll.cancel()
    await asyncio.gather(poll, return_exceptions=True)
    relay.release()
    await admin.revoke_token(tenant.token_id)
    assert await ids(feed) == [tenant.token_id]
    await feed.close()


async def test_pruning_takes_what_is_older_than_two_days_and_nothing_else(
    app: Postgres, postgres_database: PostgresDatabase
) -> None:
    connection = await asyncpg.connect(postgres_database.admin_dsn)
    try:
        await connection.execute("delete from ibex_core.changes")
        await connection.execute(
            "insert into ibex_core.changes (kind, entity_id, changed_at)"
            " select 'token', gen_random_uuid(), now() - age * interval '1 hour' from generate_series(73, 1, -1) as age"
        )
        assert await prune_changes(app, batch=10) == 26
        assert await prune_changes(app, batch=10) == 0
        assert await connection.fetchval("select count(*) from ibex_core.changes") == 47
    finally:
        await connection.close()
