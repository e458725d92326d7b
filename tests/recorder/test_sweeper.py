"""Sessions nobody uses are abandoned, and reopened by their next turn."""

import asyncpg

from tests.recorder.conftest import House
from tests.turns import make_turn
from tests.waiting import eventually


async def statuses(house: House) -> dict[str, str]:
    connection = await asyncpg.connect(house.postgres.admin_dsn)
    try:
        return dict(await connection.fetch("select external_id, status from ibex_core.sessions"))
    finally:
        await connection.close()


async def test_an_idle_session_is_abandoned_and_reopened_by_its_next_turn(house: House) -> None:
    now = make_turn().completed_at
    idle = int(house.settings.session_idle_minutes * 60e6)
    await house.write(
        [
            make_turn(external_id="old", completed_at=now - idle - 1_000_000),
            make_turn(external_id="young", completed_at=now - idle + 60_000_000),
        ]
    )
    await house.deliver()
    async with house.recorder():
        await eventually(lambda: house.metrics.session_sweeper_runs_total.labels("ok").value)
    assert await statuses(house) == {"old": "abandoned", "young": "active"}
    await house.write([make_turn(external_id="old")])
    await house.deliver()
    assert await statuses(house) == {"old": "active", "young": "active"}
