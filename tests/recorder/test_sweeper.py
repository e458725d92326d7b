"""Sessions nobody uses are abandoned, each once however many nodes sweep, and reopened by their next turn."""

import asyncio
from contextlib import AsyncExitStack
from datetime import timedelta
from uuid import UUID

import asyncpg

from ibex.domain.turns import Turn
from ibex.recorder.sweeper import sweep_sessions
from ibex.stores.postgres.pool import Postgres
from ibex.stores.postgres.sessions import SessionStore
from ibex.telemetry import Metrics
from tests.recorder.conftest import House
from tests.turns import make_turn
from tests.waiting import eventually

NODES = 3
SESSIONS = 1500
"""More than a sweeper marks in one transaction."""
MINUTE = 60_000_000

NOTE_MARKS = """
create table public.marks (session_id uuid not null);
create function public.note_mark() returns trigger language plpgsql security definer as
    $$ begin insert into public.marks values (new.session_id); return null; end $$;
create trigger note_mark after update on ibex_core.sessions for each row
    when (old.status = 'active' and new.status = 'abandoned') execute function public.note_mark();
"""


async def statuses(house: House) -> dict[str, str]:
    connection = await asyncpg.connect(house.postgres.admin_dsn)
    try:
        return dict(await connection.fetch("select external_id, status from ibex_core.sessions"))
    finally:
        await connection.close()


def idle_turns(house: House) -> list[Turn]:
    long_ago = make_turn().completed_at - int(house.settings.session_idle_minutes + 1) * MINUTE
    return [make_turn(external_id=f"s-{number}", completed_at=long_ago) for number in range(SESSIONS)]


async def test_an_idle_session_is_abandoned_and_reopened_by_its_next_turn(house: House) -> None:
    now = make_turn().completed_at
    idle = int(house.settings.session_idle_minutes * MINUTE)
    await house.write(
        [
            make_turn(external_id="old", completed_at=now - idle - 1_000_000),
            make_turn(external_id="young", completed_at=now - idle + MINUTE),
        ]
    )
    await house.deliver()
    async with house.recorder():
        await eventually(lambda: house.metrics.session_sweeper_runs_total.labels("ok").value)
    assert await statuses(house) == {"old": "abandoned", "young": "active"}
    await house.write([make_turn(external_id="old")])
    await house.deliver()
    assert await statuses(house) == {"old": "active", "young": "active"}


async def test_many_nodes_mark_each_session_once_while_turns_arrive(house: House) -> None:
    owner = await asyncpg.connect(house.postgres.admin_dsn)
    await owner.execute(NOTE_MARKS)
    busy = range(0, SESSIONS, 3)
    async with AsyncExitStack() as stack:
        nodes = []
        for number in range(NODES):
            pool = await Postgres.connect(house.postgres.dsn, name=f"node {number}")
            stack.push_async_callback(pool.close)
            nodes.append((SessionStore(pool), Metrics()))
        await nodes[0][0].record(idle_turns(house))
        idle, stop = timedelta(minutes=house.settings.session_idle_minutes), asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            for sessions, metrics in nodes:
                tasks.create_task(sweep_sessions(sessions, idle, metrics, stop))
            arrivals = [
                tasks.create_task(
                    sessions.record([make_turn(external_id=f"s-{session}") for session in busy[start::4]])
                )
                for start in range(4)
                for sessions, _ in nodes
            ]
            await asyncio.gather(*arrivals)
            swept = [metrics.session_sweeper_runs_total.labels("ok") for _, metrics in nodes]
            await eventually(lambda: all(runs.value for runs in swept))
            stop.set()

    marked = [metrics.session_sweeper_marked_total.labels("abandoned").value for _, metrics in nodes]
    marks: list[UUID] = [row[0] for row in await owner.fetch("select session_id from public.marks")]
    deadlocks = await owner.fetchval("select deadlocks from pg_stat_database where datname = current_database()")
    await owner.close()
    assert sum(marked) == len(marks) == len(set(marks))
    assert deadlocks == 0
    expected = {f"s-{number}": "active" if number in busy else "abandoned" for number in range(SESSIONS)}
    assert await statuses(house) == expected


async def test_a_turn_of_twenty_minutes_is_recorded_though_its_session_was_abandoned_meanwhile(house: House) -> None:
    now = make_turn().completed_at
    idle = int(house.settings.session_idle_minutes * MINUTE)
    first = make_turn(external_id="long", completed_at=now - idle - MINUTE)
    long = make_turn(
        external_id="long",
        requested_at=now - 20 * MINUTE,
        started_at=now - 20 * MINUTE,
        completed_at=now,
        is_streaming=True,
        provider_latency_ms=20 * 60e3,
        total_latency_ms=20 * 60e3,
    )
    await house.write([first])
    await house.deliver()
    async with house.recorder(), house.journal() as journal:
        await eventually(lambda: house.metrics.session_sweeper_marked_total.labels("abandoned").value)
        await journal.record(long)
        await house.wait_for(house.checkpoints, [first.turn_id, long.turn_id])
        await house.wait_for(house.trace_ids, [first.turn_id, long.turn_id])
    assert await house.checkpoints() == [first.turn_id, long.turn_id]
    (trace,) = (row for row in await house.traces() if row["turn_id"] == long.turn_id)
    assert trace["completed_at"] - trace["requested_at"] == timedelta(minutes=20)
    assert trace["total_latency_ms"] == 20 * 60e3
    runs = house.metrics.session_sweeper_runs_total.labels("ok")
    before = runs.value
    async with house.recorder():  # another sweep: its end counts, not its start
        await eventually(lambda: runs.value > before)
    assert await statuses(house) == {"long": "active"}
