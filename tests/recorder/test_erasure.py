"""Turns of an erased organization are dropped by both deliveries and counted, whenever and from wherever they come."""

import asyncio
import shutil
from uuid import UUID

import asyncpg
import pytest

from ibex.domain.identity import OrgId
from ibex.domain.turns import Turn
from ibex.recorder.erasure import erase_organization
from ibex.recorder.salvage import deliver_journal
from ibex.recorder.sinks import TraceSink
from ibex.recorder.take_backs import TakeBacks
from ibex.stores.clickhouse.traces import TraceStore
from ibex.stores.postgres.erasure import OrganizationEraser
from ibex.stores.postgres.identity_admin import IdentityAdmin
from ibex.stores.postgres.pool import Postgres
from ibex.stores.postgres.sessions import SessionStore
from tests.recorder.conftest import House
from tests.tenants import Tenant, make_tenant
from tests.turns import make_turn


@pytest.fixture
async def owner(house: House):
    postgres = await Postgres.connect(house.postgres.admin_dsn, name="operator")
    yield postgres
    await postgres.close()


@pytest.fixture
async def tenant(owner: Postgres) -> Tenant:
    return await make_tenant(IdentityAdmin(owner), "acme")


async def erase(house: House, owner: Postgres, org_id: OrgId) -> None:
    traces = TraceStore(house.clickhouse_dsn)

    async def nothing(*_: object) -> int:
        return 0

    await erase_organization(
        org_id,
        organizations=OrganizationEraser(owner),
        traces=traces.erasure,
        delete_keys=nothing,
        tell=nothing,
        journal_dir=house.journal_dir,
    )
    await traces.close()


async def kept_of(house: House, org_id: UUID) -> tuple[int, int]:
    """Checkpoints and traces of an organization."""
    connection = await asyncpg.connect(house.postgres.admin_dsn)
    checkpoints = await connection.fetchval("select count(*) from ibex_core.checkpoints where org_id = $1", org_id)
    await connection.close()
    store = TraceStore(house.clickhouse_dsn)
    async with asyncio.timeout(30):
        while found := await store.list(org_ids=[OrgId(org_id)], limit=None):  # noqa: ASYNC110 - being deleted
            await asyncio.sleep(0.05)
    await store.close()
    return checkpoints, len(found)


def dropped(house: House) -> tuple[float, float]:
    counter = house.metrics.erased_turns_dropped_total
    return counter.labels("postgres").value, counter.labels("clickhouse").value


async def test_turns_that_waited_in_a_journal_are_dropped_and_the_others_delivered(
    house: House, owner: Postgres, tenant: Tenant
) -> None:
    ours, theirs = [make_turn() for _ in range(5)], [tenant.make_turn() for _ in range(7)]
    await house.write([turn for pair in zip(ours, theirs[:5], strict=True) for turn in pair] + theirs[5:])
    await erase(house, owner, tenant.org_id)
    await house.deliver()
    assert await kept_of(house, tenant.org_id) == (0, 0)
    assert dropped(house) == (7, 7)
    ids = sorted(turn.turn_id for turn in ours)
    assert sorted(await house.checkpoints()) == sorted(await house.trace_ids()) == ids
    assert house.files("*.segment") == []
    assert house.metrics.journal_dead_letters.labels().value == 0
    assert house.metrics.session_checkpoint_total.labels("error").value == 0


async def test_turns_that_come_while_an_organization_is_erased_leave_nothing(
    house: House, owner: Postgres, tenant: Tenant
) -> None:
    """A recorder delivers all the while: some turns before the erasure, some in its middle, some after it."""
    written = 0
    async with house.recorder(), house.journal() as journal:
        await asyncio.gather(*(journal.record(tenant.make_turn(f"s-{number}")) for number in range(100)))
        written += 100
        erasing = asyncio.ensure_future(erase(house, owner, tenant.org_id))
        while not erasing.done():
            await journal.record(tenant.make_turn(f"s-{written}"))
            written += 1
            await asyncio.sleep(0.001)
        await erasing
        last = [tenant.make_turn() for _ in range(20)] + [make_turn()]
        await asyncio.gather(*(journal.record(turn) for turn in last))
        await house.wait_for(house.checkpoints, [last[-1].turn_id])
        await house.wait_for(house.trace_ids, [last[-1].turn_id])
    assert written > 100
    assert await kept_of(house, tenant.org_id) == (0, 0)
    assert min(dropped(house)) >= 20
    assert house.metrics.journal_dead_letters.labels().value == 0


async def test_an_insert_that_an_erasure_overtook_is_taken_back(house: House, owner: Postgres, tenant: Tenant) -> None:
    """The worst order: the recorder has asked nobody yet, and the erasure has deleted what it saw."""
    store = TraceStore(house.clickhouse_dsn)
    insert = store.insert

    async def erase_before_insert(turns: list[Turn], token: str) -> None:
        await erase(house, owner, tenant.org_id)
        await insert(turns, token)

    store.insert = erase_before_insert  # type: ignore[assignment, method-assign]
    take_backs = TakeBacks(store.erasure, house.metrics)
    sink = TraceSink(store, house.metrics, take_backs)
    assert await sink.send([tenant.make_turn()], token="t", is_doubtful=False) == []
    await take_backs.settle()
    assert await kept_of(house, tenant.org_id) == (0, 0)
    await store.close()


async def test_the_journal_of_a_lost_node_brings_nothing_back(
    house: House, owner: Postgres, tenant: Tenant, tmp_path
) -> None:
    await house.write([tenant.make_turn(), make_turn()])
    saved = shutil.copytree(house.journal_dir, tmp_path / "saved")
    await house.deliver()
    await erase(house, owner, tenant.org_id)
    traces = TraceStore(house.clickhouse_dsn)
    salvage = await deliver_journal(saved, SessionStore(owner), traces)
    await traces.close()
    assert (salvage.dropped, salvage.checkpoints_known, salvage.dead_letters) == (1, 1, 0)
    assert await kept_of(house, tenant.org_id) == (0, 0)
