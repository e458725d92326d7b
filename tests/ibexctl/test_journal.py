"""`ibexctl journal` and `reconcile`: what waits, what was refused, what a lost node left, and whether all agree."""

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

import msgspec
import pytest

from ibex.domain.turns import Outcome, Turn
from ibex.stores.clickhouse.traces import TraceStore
from ibex.stores.journal.writer import Journal
from ibex.stores.postgres.identity_admin import IdentityAdmin
from ibex.stores.postgres.pool import Postgres
from ibex.stores.postgres.sessions import SessionStore
from tests.tenants import Tenant, make_tenant

A_WHILE_AGO = (int(time.time()) - 600) * 1_000_000


@pytest.fixture
def tenant(ibexctl, on_stores: Mapping[str, str]) -> Tenant:
    """An organization on migrated stores."""
    assert ibexctl("migrate", "up").code == 0

    async def make() -> Tenant:
        postgres = await Postgres.connect(on_stores["IBEX_POSTGRES_ADMIN_DSN"], name="tests")
        try:
            return await make_tenant(IdentityAdmin(postgres), "acme")
        finally:
            await postgres.close()

    return asyncio.run(make())


def turn_of(tenant: Tenant, **changes: object) -> Turn:
    moment = A_WHILE_AGO + int(uuid4().int % 1_000_000)
    return tenant.make_turn("chat", requested_at=moment, started_at=moment, completed_at=moment, **changes)


def write_journal(directory: Path, turns: list[Turn]) -> None:
    async def write() -> None:
        journal = Journal(directory, writer="worker-0", min_free_bytes=0)
        journal.open()
        await asyncio.gather(*(journal.record(turn) for turn in turns))
        await journal.close()

    asyncio.run(write())


def store(stores: Mapping[str, str], *, checkpoints: list[Turn], traces: list[Turn]) -> None:
    async def write() -> None:
        postgres = await Postgres.connect(stores["IBEX_POSTGRES_DSN"], name="tests")
        clickhouse = await TraceStore.connect(stores["IBEX_CLICKHOUSE_DSN"])
        try:
            assert (await SessionStore(postgres).record(checkpoints)).refused == []
            await clickhouse.insert(traces, str(uuid4()))
        finally:
            await clickhouse.close()
            await postgres.close()

    asyncio.run(write())


def test_an_empty_data_directory_has_an_empty_journal(ibexctl) -> None:
    status = ibexctl("journal", "status", "--json").data
    assert status["segments"] == status["bytes"] == 0
    assert [entry["pending_turns"] for entry in status["stores"]] == [0, 0]
    assert ibexctl("journal", "dead-letters", "list", "--json").data["dead_letters"] == []
    assert ibexctl("journal", "dead-letters", "replay", "--json").data == {"replayed": 0}
    assert ibexctl("journal", "dead-letters", "replay", "7", "--json").code == 1


def test_a_lost_nodes_journal_is_shown_and_delivered_once(ibexctl, on_stores, tenant: Tenant, data_dir: Path) -> None:
    turns = [turn_of(tenant) for _ in range(30)]
    turns.append(turn_of(tenant, outcome=Outcome.PROVIDER_ERROR, has_checkpoint=False, status_code=503))
    refused = turn_of(tenant, agent_id=uuid4())
    journal_dir = data_dir / "journal"
    write_journal(journal_dir, [*turns, refused])
    (path,) = journal_dir.glob("*.segment")
    path.write_bytes(path.read_bytes() + b"\xc1\xf5ibtorn")

    status = ibexctl("journal", "status", "--json").data
    assert (status["segments"], status["growing_segments"]) == (1, 0)
    assert {entry["store"]: entry["pending_turns"] for entry in status["stores"]} == {"postgres": 31, "clickhouse": 32}
    before = ibexctl("reconcile", "--json")
    assert before.code == 0
    assert before.data["pending"] == {"postgres": 31, "clickhouse": 32}

    lost = data_dir / "lost"
    journal_dir.rename(lost)
    store(on_stores, checkpoints=turns[:10], traces=turns[:20])
    delivered = ibexctl("journal", "deliver", lost, "--json").data
    assert delivered == {
        "segments_delivered": 1,
        "segments_left": 0,
        "checkpoints_written": 20,
        "checkpoints_known": 10,
        "dropped": 0,
        "dead_letters": 1,
        "quarantined": 1,
    }
    after = ibexctl("reconcile", "--json")
    assert (after.data["checkpoints"], after.data["traces"]) == (30, 31)
    assert [item["turn_id"] for item in after.data["differences"]] == [str(refused.turn_id)]
    assert after.code == 1

    lost.rename(journal_dir)
    (letter,) = ibexctl("journal", "dead-letters", "list", "--json").data["dead_letters"]
    assert (letter["store"], letter["turn_id"], letter["reason"]) == ("postgres", str(refused.turn_id), "agent_gone")
    assert ibexctl("journal", "dead-letters", "replay", letter["dead_letter_id"], "--json").data == {"replayed": 1}
    assert "refused it" in ibexctl("reconcile", "--json").data["differences"][0]["fault"]


def test_a_journal_that_is_none_is_not_delivered(ibexctl, on_stores, tenant: Tenant, data_dir: Path) -> None:
    assert "no segment" in ibexctl("journal", "deliver", data_dir, "--json").error["message"]


def test_reconcile_names_each_turn_in_which_the_stores_differ(ibexctl, on_stores, tenant: Tenant) -> None:
    same = [turn_of(tenant) for _ in range(20)]
    same.append(turn_of(tenant, outcome=Outcome.CLIENT_DISCONNECT, is_complete=False))
    left = turn_of(tenant, outcome=Outcome.CLIENT_DISCONNECT, status_code=499, has_checkpoint=False)
    store(on_stores, checkpoints=same, traces=[*same, left])
    assert ibexctl("reconcile", "--json").data["is_consistent"]

    untraced, unkept, twice, other = (turn_of(tenant) for _ in range(4))
    cheaper = msgspec.structs.replace(other, output_tokens=1)
    store(on_stores, checkpoints=[untraced, twice, other], traces=[unkept, twice, twice, cheaper])
    found = ibexctl("reconcile", "--since", "30m", "--json")
    assert found.code == 1
    assert {item["turn_id"]: item["fault"] for item in found.data["differences"]} == {
        str(untraced.turn_id): "no trace",
        str(unkept.turn_id): "no checkpoint",
        str(twice.turn_id): "2 traces",
        str(other.turn_id): "checkpoint and trace count other tokens",
    }
    assert ibexctl("reconcile", "--since", "1m", "--json").code == 0
