"""The recorder deletes what is past its retention, and nothing else, however many nodes do."""

import asyncio
from datetime import timedelta
from uuid import UUID

import asyncpg
import pytest

from ibex.domain.turns import Turn
from ibex.recorder.retention import expire_checkpoints
from ibex.stores.postgres.pool import Postgres
from ibex.stores.postgres.sessions import Expired, SessionStore
from ibex.telemetry import Metrics
from tests.recorder.conftest import House
from tests.turns import make_turn


async def grow_old(house: House, turns: list[Turn]) -> None:
    connection = await asyncpg.connect(house.postgres.admin_dsn)
    await connection.execute(
        "update ibex_core.checkpoints set recorded_at = clock_timestamp() - interval '31 days'"
        " where turn_id = any($1::uuid[])",
        [turn.turn_id for turn in turns],
    )
    await connection.close()


async def deliver(house: House, turns: list[Turn]) -> list[UUID]:
    await house.write(turns)
    await house.deliver()
    return sorted(turn.turn_id for turn in turns)


async def test_without_a_setting_everything_is_kept(house: House) -> None:
    turns = [make_turn() for _ in range(3)]
    everything = await deliver(house, turns)
    await grow_old(house, turns)
    async with house.recorder():
        await asyncio.sleep(0.2)
    assert sorted(await house.checkpoints()) == everything
    assert house.metrics.retention_runs_total.labels("ok").value == 0


async def test_a_recorder_with_a_retention_says_so_and_deletes_what_is_older(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    old, young = [make_turn() for _ in range(3)], [make_turn() for _ in range(2)]
    await deliver(house, old)
    kept = await deliver(house, young)
    await grow_old(house, old)
    house.settings = house.settings.model_copy(update={"checkpoint_retention_days": 30})
    async with house.recorder():
        await house.wait_for(house.checkpoints, kept)
    said = [record for record in caplog.records if record.message.startswith("old checkpoints of every organization")]
    assert [(record.levelname, vars(record)["age_days"]) for record in said] == [("WARNING", 30)]
    assert house.metrics.retention_deleted_total.labels("checkpoint").value == 3
    assert house.metrics.retention_deleted_total.labels("session").value == 0
    assert house.metrics.retention_runs_total.labels("ok").value == 1
    assert len(await house.trace_ids()) == 5, "traces have a time of their own"


async def test_many_nodes_delete_each_checkpoint_once(house: House) -> None:
    sessions = [f"s-{number}" for number in range(20)]
    old = [make_turn(external_id=name) for name in sessions for _ in range(10)]
    kept = [make_turn(external_id=name) for name in sessions[:10]]
    await deliver(house, old)
    left = await deliver(house, kept)
    await grow_old(house, old)
    pools = [await Postgres.connect(house.postgres.dsn, name=f"node {number}") for number in range(3)]
    metrics, stop = [Metrics() for _ in pools], asyncio.Event()
    async with asyncio.TaskGroup() as nodes:
        for pool, counted in zip(pools, metrics, strict=True):
            expiry = expire_checkpoints(SessionStore(pool), timedelta(days=30), counted, stop, batch=7)
            nodes.create_task(expiry)
        await house.wait_for(house.checkpoints, left)
        stop.set()
    for pool in pools:
        await pool.close()
    deleted = [counted.retention_deleted_total for counted in metrics]
    assert sum(counter.labels("checkpoint").value for counter in deleted) == 200
    assert sum(counter.labels("session").value for counter in deleted) == 10
    assert all(counted.retention_runs_total.labels("error").value == 0 for counted in metrics)


async def test_what_a_recorder_holds_is_tried_again_at_once(house: House) -> None:
    """The oldest batch is all of a session that is being recorded: that is not nothing old."""
    old = [make_turn() for _ in range(3)]
    await deliver(house, old)
    await grow_old(house, old)
    pool, stop = await Postgres.connect(house.postgres.dsn, name="node"), asyncio.Event()
    recorder = await asyncpg.connect(house.postgres.admin_dsn)
    async with asyncio.TaskGroup() as nodes:
        async with recorder.transaction():
            await recorder.execute("select from ibex_core.sessions for update")
            assert await SessionStore(pool).expire(timedelta(days=30)) == Expired(0, 0, passed_over=1)
            nodes.create_task(expire_checkpoints(SessionStore(pool), timedelta(days=30), house.metrics, stop))
            await asyncio.sleep(0.2)
            assert len(await house.checkpoints()) == 3
        await house.wait_for(house.checkpoints, [])
        stop.set()
    assert house.metrics.retention_runs_total.labels("ok").value == 1
    await recorder.close()
    await pool.close()


async def test_a_postgres_that_is_away_is_a_failed_run_and_no_fault(house: House) -> None:
    pool = await Postgres.connect("postgresql://ibex_app@127.0.0.1:1/ibex", name="away")
    stop, metrics = asyncio.Event(), Metrics()
    async with asyncio.TaskGroup() as nodes:
        nodes.create_task(expire_checkpoints(SessionStore(pool), timedelta(days=30), metrics, stop))
        async with asyncio.timeout(10):
            while not metrics.retention_runs_total.labels("error").value:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        stop.set()
    await pool.close()
