"""Sessions and checkpoints: every turn once, every index once, and no row that keeps the others back."""

import asyncio
import random
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from ibex.domain.identity import AgentId, OrgId
from ibex.domain.turns import Outcome, Turn, mint_uuid7
from ibex.errors import StoreRefused, StoreUnavailable, UnknownEntity
from ibex.stores.postgres.identity_admin import IdentityAdmin
from ibex.stores.postgres.pool import Postgres
from ibex.stores.postgres.sessions import AGENT_GONE, MAX_BATCH, ORGANIZATION_GONE, SessionStore
from tests.conftest import PostgresDatabase
from tests.relays import Relay, relayed
from tests.tenants import Tenant, make_tenant


@pytest.fixture
def sessions(app: Postgres) -> SessionStore:
    """What the recorder writes with, in the application's role."""
    return SessionStore(app)


@pytest.fixture
def shown(owner: Postgres) -> SessionStore:
    """What operators read with."""
    return SessionStore(owner)


async def indexes(owner: Postgres) -> dict[UUID, list[int]]:
    """The indexes of every session's checkpoints, in order; fails when a session's own count says otherwise."""
    async with owner.transaction() as connection:
        rows = await connection.fetch(
            "select s.session_id, s.turn_count, array_agg(c.turn_index order by c.turn_index) as indexes"
            " from ibex_core.sessions as s join ibex_core.checkpoints as c using (session_id)"
            " group by s.session_id, s.turn_count"
        )
    assert all(row["turn_count"] == len(row["indexes"]) for row in rows)
    return {row["session_id"]: row["indexes"] for row in rows}


async def test_a_turn_becomes_a_session_and_a_checkpoint(
    tenant: Tenant, sessions: SessionStore, shown: SessionStore
) -> None:
    turn = tenant.make_turn(
        "chat-1", cached_tokens=4, provider_request_id="req_1", directive_version=3, is_streaming=True
    )
    result = await sessions.record([turn])
    assert (result.written, result.duplicates, result.refused) == (1, 0, [])
    assert (result.sessions_created, result.sessions_found) == (1, 0)
    answer = await shown.show("chat-1", tenant.agent_id)
    session = answer["session"]
    assert session["session_id"] == turn.session_id
    assert (session["external_id"], session["status"], session["turn_count"]) == ("chat-1", "active", 1)
    assert session["last_turn_at"] == datetime.fromtimestamp(turn.completed_at / 1e6, UTC)
    (checkpoint,) = answer["checkpoints"]
    assert checkpoint.pop("recorded_at") is not None
    assert checkpoint == {
        "turn_id": turn.turn_id,
        "org_id": tenant.org_id,
        "agent_id": tenant.agent_id,
        "session_id": turn.session_id,
        "turn_index": 0,
        "request_id": turn.request_id,
        "status": "ok",
        "is_streaming": True,
        "is_complete": True,
        "model": "gpt-4o-mini",
        "provider": "openai",
        "provider_request_id": "req_1",
        "directive_version": 3,
        "messages_sha256": (b"m" * 32).hex(),
        "completion_sha256": (b"c" * 32).hex(),
        "input_tokens": 10,
        "output_tokens": 20,
        "cached_tokens": 4,
        "total_tokens": 30,
        "usage_source": "provider",
        "latency_ms": 4.5,
        "started_at": datetime.fromtimestamp(turn.started_at / 1e6, UTC),
        "completed_at": datetime.fromtimestamp(turn.completed_at / 1e6, UTC),
    }


async def test_a_cut_turn_has_no_usage_and_captured_content_is_shown_as_text(
    tenant: Tenant, sessions: SessionStore, shown: SessionStore
) -> None:
    unknown = dict.fromkeys(("input_tokens", "output_tokens", "total_tokens", "provider_latency_ms"))
    cut = tenant.make_turn(
        "s-1",
        outcome=Outcome.CLIENT_DISCONNECT,
        is_complete=False,
        completion_sha256=None,
        usage_source="none",
        messages='[{"role":"user","content":"naïve \\u0000"}]'.encode(),
        completion=b"\xff\0",
        **unknown,
    )
    assert (await sessions.record([cut])).written == 1
    (checkpoint,) = (await shown.show("s-1", tenant.agent_id))["checkpoints"]
    assert (checkpoint["status"], checkpoint["is_complete"], checkpoint["input_tokens"]) == (
        "client_disconnect",
        False,
        None,
    )
    assert checkpoint["latency_ms"] == 5.5
    assert checkpoint["messages"] == '[{"role":"user","content":"naïve \\u0000"}]'
    assert checkpoint["completion"] == "\ufffd\0"


async def test_turns_are_numbered_in_order_of_arrival(
    tenant: Tenant, sessions: SessionStore, shown: SessionStore
) -> None:
    first, second, third = (tenant.make_turn(started_at=1_700_000_000_000_000 + n) for n in range(3))
    await sessions.record([third])
    await sessions.record([second, first])
    answer = await shown.show("s-1", tenant.agent_id)
    assert [row["turn_id"] for row in answer["checkpoints"]] == [third.turn_id, first.turn_id, second.turn_id]
    assert [row["turn_index"] for row in answer["checkpoints"]] == [0, 1, 2]
    limited = await shown.show("s-1", tenant.agent_id, limit=2)
    assert [row["turn_index"] for row in limited["checkpoints"]] == [0, 1]


async def test_a_turn_that_comes_again_changes_nothing(tenant: Tenant, sessions: SessionStore, owner: Postgres) -> None:
    turns = [tenant.make_turn(f"s-{n % 3}") for n in range(9)]
    assert (await sessions.record([*turns, turns[0]])).written == 9
    again = await sessions.record([*turns, tenant.make_turn("s-0")])
    assert (again.written, again.duplicates, again.sessions_created, again.sessions_found) == (1, 9, 0, 3)
    assert sorted(map(len, (await indexes(owner)).values())) == [3, 3, 4]


async def test_one_name_is_another_session_for_another_agent(
    tenants: tuple[Tenant, Tenant], sessions: SessionStore, owner: Postgres
) -> None:
    ours, theirs = tenants
    result = await sessions.record([ours.make_turn("same"), theirs.make_turn("same")])
    assert (result.written, result.sessions_created) == (2, 2)


async def test_batches_larger_than_a_transaction_are_written_in_slices(
    tenant: Tenant, sessions: SessionStore, owner: Postgres
) -> None:
    turns = [tenant.make_turn(f"s-{n % 50}") for n in range(2 * MAX_BATCH + 7)]
    result = await sessions.record(turns)
    assert (result.written, result.refused) == (len(turns), [])
    assert all(found == list(range(len(found))) for found in (await indexes(owner)).values())
    assert (await sessions.record([])).written == 0


POISON: list[tuple[dict[str, Any], str]] = [
    ({"model": "gpt\0"}, "CharacterNotInRepertoireError"),
    ({"model": "gpt\ud800"}, "DataError"),
    ({"input_tokens": 1 << 70}, "DataError"),
    ({"input_tokens": -1}, "CheckViolationError checkpoints_input_tokens_check"),
    ({"directive_version": 1 << 40}, "DataError"),
    ({"completed_at": (1 << 63) - 1}, "DatetimeFieldOverflowError"),
    ({"completed_at": 1 << 60}, "CheckViolationError sessions_last_turn_at_check"),
    ({"started_at": 1 << 60}, "CheckViolationError checkpoints_started_at_check"),
    ({"messages_sha256": b""}, "CheckViolationError checkpoints_messages_sha256_check"),
    ({"external_id": "not an id"}, "CheckViolationError sessions_external_id_check"),
    ({"outcome": Outcome.REPLAYED}, "CheckViolationError checkpoints_status_check"),
]


async def test_a_poisoned_turn_is_set_apart_and_blocks_no_other(
    tenant: Tenant, sessions: SessionStore, owner: Postgres
) -> None:
    poisoned = [tenant.make_turn(**{"external_id": f"s-{n % 2}", **fields}) for n, (fields, _) in enumerate(POISON)]
    healthy = [tenant.make_turn(f"s-{n % 2}") for n in range(60)]
    batch = [*healthy, *poisoned]
    random.Random(3).shuffle(batch)
    result = await sessions.record(batch)
    reasons = {turn.turn_id: reason for turn, reason in result.refused}
    assert result.written == len(healthy)
    assert set(reasons) == {turn.turn_id for turn in poisoned}
    for turn, (fields, expected) in zip(poisoned, POISON, strict=True):
        assert reasons[turn.turn_id] == expected, fields
    assert sorted(map(len, (await indexes(owner)).values())) == [30, 30]


async def test_turns_of_an_erased_organization_or_agent_are_told_apart(
    tenants: tuple[Tenant, Tenant], sessions: SessionStore, owner: Postgres
) -> None:
    ours, theirs = tenants
    erased = replace(ours, agent_id=AgentId(uuid4()))
    nowhere = [replace(ours, org_id=OrgId(uuid4())) for _ in range(3)]
    batch = [tenant.make_turn(f"s-{n}") for n in range(100) for tenant in (ours, erased, *nowhere, theirs)]
    result = await sessions.record(batch)
    assert result.written == 200
    assert Counter(reason for _, reason in result.refused) == {AGENT_GONE: 100, ORGANIZATION_GONE: 300}
    assert {turn.agent_id for turn, reason in result.refused if reason == AGENT_GONE} == {erased.agent_id}


async def test_a_statement_refused_for_no_turns_sake_refuses_no_turn(
    tenant: Tenant, sessions: SessionStore, owner: Postgres
) -> None:
    async with owner.transaction() as connection:
        await connection.execute("revoke insert on ibex_core.checkpoints from ibex_app")
    with pytest.raises(StoreRefused, match="InsufficientPrivilege"):
        await sessions.record([tenant.make_turn()])
    assert await indexes(owner) == {}


async def test_another_organizations_turn_id_is_refused_and_not_overwritten(
    tenants: tuple[Tenant, Tenant], sessions: SessionStore, shown: SessionStore
) -> None:
    ours, theirs = tenants
    original = theirs.make_turn("victim")
    await sessions.record([original])
    result = await sessions.record(
        [ours.make_turn("forged", turn_id=original.turn_id, model="evil"), ours.make_turn("ok")]
    )
    assert (result.written, [reason for _, reason in result.refused]) == (1, ["UniqueViolationError checkpoints_pkey"])
    (checkpoint,) = (await shown.show("victim", theirs.agent_id))["checkpoints"]
    assert checkpoint["model"] == "gpt-4o-mini"


async def test_an_idle_session_is_abandoned_and_its_next_turn_reopens_it(
    tenants: tuple[Tenant, Tenant], sessions: SessionStore, shown: SessionStore
) -> None:
    ours, theirs = tenants
    hour_ago = ours.make_turn().completed_at - 3_600_000_000
    idle = [tenant.make_turn(f"idle-{n}", completed_at=hour_ago) for n in range(7) for tenant in tenants]
    await sessions.record([*idle, ours.make_turn("busy"), ours.make_turn("busy", completed_at=hour_ago)])
    assert await sessions.abandon_idle(timedelta(minutes=45), batch=3) == 14
    assert await sessions.abandon_idle(timedelta(minutes=45)) == 0

    async def status(external_id: str, tenant: Tenant) -> str:
        session = (await shown.show(external_id, tenant.agent_id))["session"]
        return str(session["status"])

    assert await status("busy", ours) == "active"
    assert await status("idle-3", theirs) == "abandoned"
    await sessions.record([theirs.make_turn("idle-3")])
    assert await status("idle-3", theirs) == "active"
    assert await status("idle-3", ours) == "abandoned"


async def test_what_does_not_exist_is_unknown(tenant: Tenant, shown: SessionStore) -> None:
    with pytest.raises(UnknownEntity) as caught:
        await shown.show("never", tenant.agent_id)
    assert caught.value.hint
    with pytest.raises(UnknownEntity):
        await shown.show("never", AgentId(uuid4()))


class Deliverer:
    """A recorder that delivers its batches until each has been acknowledged, in an order of its own."""

    def __init__(self, store: SessionStore, batches: list[list[Turn]], seed: int) -> None:
        self._store = store
        self._batches = random.Random(seed).sample(batches, len(batches))
        self.failures = 0
        self.refused = 0

    async def run(self) -> None:
        for batch in self._batches:
            while True:
                try:
                    self.refused += len((await self._store.record(batch)).refused)
                    break
                except StoreUnavailable:
                    self.failures += 1
                    await asyncio.sleep(0.005)


async def cut_at_random(relay: Relay, seed: int) -> None:
    """A number of times, not for ever: on a slow machine no batch might get through between two cuts."""
    dice = random.Random(seed)
    for _ in range(25):
        await asyncio.sleep(dice.uniform(0.02, 0.15))
        relay.cut()


@pytest.fixture
async def crowd(admin: IdentityAdmin) -> list[Tenant]:
    """A handful of organizations."""
    return [await make_tenant(admin, f"org {number}") for number in range(4)]


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_two_recorders_whose_connections_are_cut_leave_no_gap_and_no_double(
    seed: int, crowd: list[Tenant], postgres_database: PostgresDatabase, owner: Postgres
) -> None:
    dice = random.Random(seed)
    turns = [dice.choice(crowd).make_turn(f"s-{dice.randrange(8)}", turn_id=mint_uuid7()) for _ in range(3000)]
    size = 150
    first = [turns[start : start + size] for start in range(0, len(turns), size)]
    second = [turns[max(0, start - 70) : start + size - 70] for start in range(0, len(turns) + 70, size)]
    async with AsyncExitStack() as stack:
        relays = [await stack.enter_async_context(relayed(postgres_database.dsn)) for _ in range(2)]
        pools = [await Postgres.connect(relay.dsn, name="recorder", max_size=2) for relay in relays]
        deliverers = [
            Deliverer(SessionStore(pool), batches, seed)
            for pool, batches in ((pools[0], first), (pools[1], first), (pools[1], second))
        ]
        cutters = [asyncio.get_running_loop().create_task(cut_at_random(relay, seed)) for relay in relays]
        await asyncio.gather(*(deliverer.run() for deliverer in deliverers))
        for cutter in cutters:
            cutter.cancel()
        await asyncio.gather(*cutters, return_exceptions=True)
        for pool in pools:
            await pool.close()
    assert sum(deliverer.failures for deliverer in deliverers) > 0
    assert sum(deliverer.refused for deliverer in deliverers) == 0
    found = await indexes(owner)
    assert sum(map(len, found.values())) == len(turns)
    assert all(places == list(range(len(places))) for places in found.values())
