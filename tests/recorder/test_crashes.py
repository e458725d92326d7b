"""Processes die by `kill -9`; the turns they acknowledged, or were delivering, are in each store once."""

import asyncio
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.recorder.conftest import House
from tests.turns import make_turn

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("recorder_process.py")


def start(house: House, *deadly_sink: str) -> subprocess.Popen[bytes]:
    arguments = [str(house.journal_dir), house.postgres.dsn, house.clickhouse_dsn, *deadly_sink]
    return subprocess.Popen([sys.executable, str(PROGRAM), *arguments], cwd=ROOT)


@pytest.mark.parametrize("sink", ["postgres", "clickhouse"])
async def test_a_recorder_killed_between_sending_and_noting_it_delivers_once(house: House, sink: str) -> None:
    turns = [make_turn() for _ in range(50)]
    for at in (0, 25):
        await house.write(turns[at : at + 25])
        assert await asyncio.to_thread(start(house, sink).wait) == -9
    read = house.checkpoints if sink == "postgres" else house.trace_ids
    assert await read(), "it had been sent"
    await house.deliver()
    assert sorted(await house.checkpoints()) == sorted(turn.turn_id for turn in turns)
    assert sorted(await house.trace_ids()) == sorted(turn.turn_id for turn in turns)


async def test_a_recorder_killed_at_random_delivers_once(house: House) -> None:
    turns = [make_turn(external_id=f"s-{n % 7}") for n in range(2000)]
    async with house.journal(segment_bytes=64 << 10) as journal:
        for at in range(0, 2000, 500):
            process = start(house)
            await asyncio.sleep(0.7)
            for turn in turns[at : at + 500]:
                await journal.record(turn)
                await asyncio.sleep(0.0005)
            await asyncio.sleep(random.uniform(0, 0.2))
            process.kill()
            await asyncio.to_thread(process.wait)
    await house.deliver()
    assert sorted(await house.checkpoints()) == sorted(turn.turn_id for turn in turns)
    assert sorted(await house.trace_ids()) == sorted(turn.turn_id for turn in turns)
    assert house.files("*.segment") == []


async def test_a_successor_waits_until_its_predecessor_is_gone(house: House) -> None:
    turns = [make_turn() for _ in range(20)]
    async with house.recorder():
        successor = start(house)
        await house.write(turns)
        await house.wait_for(house.trace_ids, [turn.turn_id for turn in turns])
    late = make_turn()
    await house.write([late])
    await house.wait_for(house.trace_ids, [turn.turn_id for turn in [*turns, late]])
    successor.kill()
    await asyncio.to_thread(successor.wait)
