"""Every turn reaches each store once, whichever of them is away, lies about its answers, or refuses a row."""

import asyncio
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from uuid import UUID, uuid4

import asyncpg
import pytest

from ibex.domain.turns import Outcome
from ibex.recorder.ledger import DATABASE_NAME, Ledger
from ibex.stores.journal.segment_writer import SegmentWriter
from ibex.stores.journal.segments import HEADER_SIZE, encode_record
from tests.conftest import run_clickhouse
from tests.recorder.conftest import House
from tests.recorder.relay import Relay
from tests.turns import ORG, make_turn


def ids(turns: list) -> list:
    return sorted(turn.turn_id for turn in turns)


async def test_a_turn_reaches_both_stores_and_its_segment_is_removed(house: House) -> None:
    turns = [make_turn() for _ in range(30)]
    async with house.recorder():
        await house.write(turns)
        await house.wait_for(house.checkpoints, ids(turns))
        await house.wait_for(house.trace_ids, ids(turns))
    assert house.files("*.segment") == []
    assert house.metrics.session_checkpoint_total.labels("ok").value == 30
    assert house.metrics.clickhouse_flush_total.labels("ok").value >= 1
    assert house.metrics.journal_pending_turns.labels().value == 0
    assert house.metrics.journal_dead_letters.labels().value == 0


async def test_an_ending_without_a_checkpoint_leaves_a_trace_alone(house: House) -> None:
    kept, left = make_turn(), make_turn(outcome=Outcome.PROVIDER_ERROR, has_checkpoint=False, status_code=503)
    await house.write([kept, left])
    await house.deliver()
    assert await house.checkpoints() == [kept.turn_id]
    assert sorted(await house.trace_ids()) == ids([kept, left])


async def test_a_trace_is_visible_half_a_second_after_its_turn(house: House) -> None:
    async with house.recorder(), house.journal() as journal:
        for _ in range(60):
            turn = make_turn()
            await journal.record(turn)
            await asyncio.sleep(0.025)
        await asyncio.sleep(0.5)
        lags = sorted((row["inserted_at"] - row["completed_at"]).total_seconds() for row in await house.traces())
    assert len(lags) == 60
    assert lags[-1] < 0.5


async def test_clickhouse_gets_at_most_five_batches_a_second(house: House) -> None:
    async with house.recorder(), house.journal() as journal:
        began = asyncio.get_running_loop().time()
        for _ in range(100):
            await journal.record(make_turn())
            await asyncio.sleep(0.01)
        flushes = house.metrics.clickhouse_flush_total.labels("ok").value
        assert flushes <= 1 + 5 * (asyncio.get_running_loop().time() - began)


@pytest.mark.parametrize("away", ["postgres", "clickhouse"])
async def test_a_store_that_is_away_holds_up_only_itself(house: House, data_dir: Path, away: str) -> None:
    dsns = {"postgres": house.postgres.dsn, "clickhouse": house.clickhouse_dsn}
    reads = {"postgres": house.checkpoints, "clickhouse": house.trace_ids}
    (other,) = reads.keys() - {away}
    turns = [make_turn() for _ in range(2000)]
    async with Relay(dsns[away], data_dir) as relay, house.recorder(**{away: relay.dsn}):
        await house.write(turns[:10])
        await house.wait_for(reads[away], ids(turns[:10]))
        await relay.shut()
        for at in range(10, 2000, 199):
            await house.write(turns[at : at + 199])
        await house.wait_for(reads[other], ids(turns))
        assert sorted(await reads[away]()) == ids(turns[:10])
        assert house.files("*.segment"), "what a store has not got is kept"
        await asyncio.sleep(1.1)
        assert house.metrics.journal_pending_turns.labels().value == 1990
        assert house.metrics.journal_oldest_seconds.labels().value > 1
        assert house.metrics.store_away.labels(away).value == 1
        assert house.metrics.store_away.labels(other).value == 0
        assert 0 < house.metrics.journal_pressure_ratio.labels().value < 1
        await relay.open()
        await house.wait_for(reads[away], ids(turns))
    assert house.files("*.segment") == []


@pytest.mark.parametrize("store", ["postgres", "clickhouse"])
async def test_a_lost_answer_makes_no_second_row(house: House, data_dir: Path, store: str) -> None:
    dsns = {"postgres": house.postgres.dsn, "clickhouse": house.clickhouse_dsn}
    turns = [make_turn() for _ in range(40)]
    async with Relay(dsns[store], data_dir) as relay, house.recorder(**{store: relay.dsn}):
        await house.write(turns[:1])
        await house.wait_for(house.trace_ids, ids(turns[:1]))
        await house.wait_for(house.checkpoints, ids(turns[:1]))
        for at in range(1, 40, 13):
            relay.answers_to_lose = 2
            await house.write(turns[at : at + 13])
            await house.wait_for(house.trace_ids, ids(turns[: at + 13]))
            await house.wait_for(house.checkpoints, ids(turns[: at + 13]))
    assert relay.answers_lost > 2
    assert sorted(await house.trace_ids()) == ids(turns)
    assert sorted(await house.checkpoints()) == ids(turns)


async def test_a_lost_ledger_delivers_nothing_twice(house: House) -> None:
    turns = [make_turn() for _ in range(300)]
    async with house.journal() as journal:
        for at in range(0, 300, 100):
            await asyncio.gather(*(journal.record(turn) for turn in turns[at : at + 100]))
            await house.deliver()
        for name in house.files(f"{DATABASE_NAME}*"):
            name.unlink()
        turns.append(make_turn())
        await journal.record(turns[-1])
        await house.deliver()
    assert sorted(await house.trace_ids()) == ids(turns)
    assert sorted(await house.checkpoints()) == ids(turns)


async def test_a_journal_that_is_copied_back_after_its_delivery_changes_nothing(house: House, tmp_path: Path) -> None:
    turns = [make_turn() for _ in range(50)]
    await house.write(turns)
    copy = shutil.copytree(house.journal_dir, tmp_path / "copy")
    await house.deliver()
    shutil.copytree(copy, house.journal_dir, dirs_exist_ok=True)
    later = make_turn()
    await house.write([later])
    await house.deliver()
    assert sorted(await house.trace_ids()) == ids([*turns, later])
    assert sorted(await house.checkpoints()) == ids([*turns, later])
    assert house.files("*.segment") == []


async def test_a_damaged_ledger_is_put_aside_and_delivery_goes_on(house: House) -> None:
    turns = [make_turn() for _ in range(3)]
    await house.write(turns[:2])
    (house.journal_dir / DATABASE_NAME).write_bytes(b"no database" * 1000)
    await house.deliver()
    assert sorted(await house.trace_ids()) == ids(turns[:2])
    assert len(house.files("recorder.damaged-*")) == 1


async def test_what_a_torn_tail_or_a_flipped_byte_left_readable_is_delivered(house: House) -> None:
    turns = [make_turn() for _ in range(100)]
    await house.write(turns)
    (path,) = house.files("*.segment")
    data = bytearray(path.read_bytes())
    size = (len(data) - HEADER_SIZE) // 100
    data[HEADER_SIZE + 50 * size + 40] ^= 0x10
    path.write_bytes(data + b"\xc1\xf5ibtorn")
    await house.deliver()
    expected = ids(turns[:50] + turns[51:])
    assert sorted(await house.trace_ids()) == expected
    assert sorted(await house.checkpoints()) == expected
    assert [len(kept.read_bytes()) for kept in house.files("*.quarantine")] == [size, 8]
    assert house.metrics.journal_dead_letters.labels().value == 2
    assert house.files("*.segment") == []


async def test_a_row_that_postgres_refuses_is_put_aside_and_can_be_replayed(house: House) -> None:
    agent = uuid4()
    good, bad = [make_turn() for _ in range(20)], make_turn(agent_id=agent)
    await house.write([*good[:10], bad, *good[10:]])
    await house.deliver()
    assert sorted(await house.checkpoints()) == ids(good)
    assert sorted(await house.trace_ids()) == ids([*good, bad])
    assert house.metrics.journal_dead_letters.labels().value == 1
    with closing(Ledger(house.journal_dir)) as ledger:
        (letter,) = ledger.dead_letters()
        assert (letter.sink, letter.turn_id, letter.reason) == ("postgres", bad.turn_id, "agent_gone")
        assert ledger.want_replay() == 1
        await house.deliver()
        assert len(ledger.dead_letters()) == 1, "refused again, it stays"
        await register(house, agent)
        assert ledger.want_replay([letter.dead_letter_id]) == 1
        await house.deliver()
        assert ledger.dead_letters() == []
    assert bad.turn_id in await house.checkpoints()


async def register(house: House, agent_id: UUID) -> None:
    connection = await asyncpg.connect(house.postgres.admin_dsn)
    sql = "insert into ibex_core.agents (agent_id, org_id, name) values ($1, $2, 'late')"
    await connection.execute(sql, agent_id, ORG)
    await connection.close()


async def test_turns_of_an_erased_organization_are_dropped_and_counted(house: House) -> None:
    await house.write([make_turn(org_id=uuid4()), make_turn()])
    await house.deliver()
    assert len(await house.checkpoints()) == 1
    assert house.metrics.session_checkpoint_total.labels("error").value == 0
    assert house.metrics.erased_turns_dropped_total.labels("postgres").value == 1
    assert house.metrics.journal_dead_letters.labels().value == 0


async def test_a_row_that_fits_no_column_is_put_aside(house: House) -> None:
    good, bad = [make_turn() for _ in range(20)], make_turn(attempts=70_000)
    await house.write([*good[:10], bad, *good[10:]])
    await house.deliver()
    assert sorted(await house.trace_ids()) == ids(good)
    with closing(Ledger(house.journal_dir)) as ledger:
        refused = [letter.turn_id for letter in ledger.dead_letters() if letter.sink == "clickhouse"]
    assert refused == [bad.turn_id]


async def test_a_row_that_clickhouse_refuses_is_put_aside_and_can_be_replayed(house: House) -> None:
    run_clickhouse(house.clickhouse_dsn, "alter table llm_traces add constraint c check model != 'forbidden'")
    good, bad = [make_turn() for _ in range(20)], make_turn(model="forbidden")
    await house.write([*good[:10], bad, *good[10:]])
    await house.deliver()
    assert sorted(await house.trace_ids()) == ids(good)
    with closing(Ledger(house.journal_dir)) as ledger:
        assert [(letter.sink, letter.turn_id) for letter in ledger.dead_letters()] == [("clickhouse", bad.turn_id)]
        run_clickhouse(house.clickhouse_dsn, "alter table llm_traces drop constraint c")
        ledger.want_replay()
        await house.deliver()
        assert ledger.dead_letters() == []
    assert sorted(await house.trace_ids()) == ids([*good, bad])


async def test_a_record_that_is_no_turn_is_put_aside(house: House) -> None:
    turn = make_turn()
    await house.write([turn])
    writer = SegmentWriter.create(house.journal_dir, "worker-9")
    writer.append([encode_record(b"no turn")])
    writer.close()
    await house.deliver()
    assert await house.checkpoints() == await house.trace_ids() == [turn.turn_id]
    with closing(Ledger(house.journal_dir)) as ledger:
        assert [(letter.sink, letter.payload) for letter in ledger.dead_letters()].count(("postgres", b"no turn")) == 1
    assert house.files("*.segment") == []


async def test_a_segment_of_a_living_writer_is_kept(house: House) -> None:
    turn = make_turn()
    async with house.journal() as journal:
        await journal.record(turn)
        await house.deliver()
        assert await house.trace_ids() == [turn.turn_id]
        assert len(house.files("*.segment")) == 1


async def test_the_ledger_is_for_its_owner_alone_and_forgets_removed_segments(house: House) -> None:
    await house.write([make_turn()])
    await house.deliver()
    assert [path.stat().st_mode & 0o777 for path in house.files(DATABASE_NAME)] == [0o600]
    with closing(sqlite3.connect(house.journal_dir / DATABASE_NAME)) as database:
        assert database.execute("select count(*) from marks").fetchone() == (0,)
