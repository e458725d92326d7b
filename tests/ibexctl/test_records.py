"""`ibexctl session` and `ibexctl trace`: what was recorded, as people and programs read it."""

import asyncio
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from uuid import uuid4

import pytest

from ibex.domain.turns import Outcome, Turn
from ibex.stores.clickhouse.traces import TraceStore
from ibex.stores.postgres.identity_admin import IdentityAdmin
from ibex.stores.postgres.pool import Postgres
from ibex.stores.postgres.sessions import SessionStore
from ibexctl.output import format_time
from ibexctl.traces import stages
from tests.tenants import Tenant, make_tenant

DAWN = (int(time.time()) - 3600) * 1_000_000
"""A whole second an hour ago (Unix microseconds): traces older than 90 days are dropped."""

DAWN_WRITTEN = format_time(datetime.fromtimestamp(DAWN / 1_000_000, UTC))


@pytest.fixture
def tenants(ibexctl, on_stores: Mapping[str, str]) -> tuple[Tenant, Tenant]:
    """Two organizations on migrated stores."""
    assert ibexctl("migrate", "up").code == 0

    async def make() -> tuple[Tenant, Tenant]:
        postgres = await Postgres.connect(on_stores["IBEX_POSTGRES_ADMIN_DSN"], name="tests")
        try:
            admin = IdentityAdmin(postgres)
            return await make_tenant(admin, "acme"), await make_tenant(admin, "other")
        finally:
            await postgres.close()

    return asyncio.run(make())


def record(stores: Mapping[str, str], *turns: Turn) -> None:
    async def write() -> None:
        postgres = await Postgres.connect(stores["IBEX_POSTGRES_DSN"], name="tests")
        traces = await TraceStore.connect(stores["IBEX_CLICKHOUSE_DSN"])
        try:
            result = await SessionStore(postgres).record([turn for turn in turns if turn.has_checkpoint])
            assert result.refused == []
            await traces.insert(turns, str(uuid4()))
        finally:
            await traces.close()
            await postgres.close()

    asyncio.run(write())


def test_a_session_is_shown_with_all_its_checkpoints_oldest_first(ibexctl, on_stores, tenants) -> None:
    acme, _ = tenants
    turns = [acme.make_turn("chat-1", started_at=DAWN + k, completed_at=DAWN + k, output_tokens=k) for k in range(60)]
    record(on_stores, *turns)
    shown = ibexctl("session", "show", "chat-1", "--agent", acme.agent_id, "--json").data
    assert shown.keys() == {"session", "checkpoints"}
    assert shown["session"]["external_id"] == "chat-1"
    assert shown["session"]["turn_count"] == 60
    assert [row["turn_index"] for row in shown["checkpoints"]] == list(range(60))
    assert [row["output_tokens"] for row in shown["checkpoints"]] == list(range(60))
    assert shown["checkpoints"][0]["turn_id"] == str(turns[0].turn_id)
    assert shown["checkpoints"][0]["request_id"] == str(turns[0].request_id)
    assert shown["checkpoints"][0]["completed_at"] == DAWN_WRITTEN

    limited = ibexctl("session", "show", "chat-1", "--agent", acme.agent_id, "--limit", 2, "--json").data
    assert [row["turn_index"] for row in limited["checkpoints"]] == [0, 1]
    plain = ibexctl("session", "show", "chat-1", "--agent", acme.agent_id, "--limit", 1).out.splitlines()
    assert plain[-2].startswith("turn_index\tcompleted_at\t")
    assert plain[-1].startswith(f"0\t{DAWN_WRITTEN}\t")


def test_sessions_are_listed_with_the_latest_turn_first_and_by_whose_they_are(ibexctl, on_stores, tenants) -> None:
    acme, other = tenants
    days = 24 * 3600 * 1_000_000
    record(
        on_stores,
        acme.make_turn("old", completed_at=DAWN - days),
        acme.make_turn("new", completed_at=DAWN),
        other.make_turn("theirs", completed_at=DAWN - 1_000_000),
    )

    def listed(*words: object) -> list[str]:
        return [row["external_id"] for row in ibexctl("session", "list", *words, "--json").data["sessions"]]

    assert listed() == ["new", "theirs", "old"]
    assert listed("--limit", 1) == ["new"]
    assert listed("--org", "other") == listed("--agent", other.agent_id) == ["theirs"]
    assert listed("--status", "abandoned") == []
    lines = ibexctl("session", "list", "--org", "acme", "--limit", 1).out.splitlines()
    assert lines[0].startswith("session\torg_id\tagent_id\tstatus\tturn_count\t")
    assert lines[1].startswith(f"new\t{acme.org_id}\t{acme.agent_id}\tactive\t1\t")


def test_traces_are_summed_up_by_organization_agent_and_model(ibexctl, on_stores, tenants) -> None:
    acme, other = tenants
    whole = [
        acme.make_turn(requested_at=DAWN, model="a", total_latency_ms=float(k), input_tokens=k, output_tokens=2)
        for k in range(1, 101)
    ]
    cut = {"outcome": Outcome.INCOMPLETE, "is_complete": False, "total_latency_ms": 9999.0}
    unknown = {"input_tokens": None, "output_tokens": None, "usage_source": "none"}
    failed = other.make_turn(requested_at=DAWN, model="b", **cut, **unknown)
    record(on_stores, *whole, failed, acme.make_turn(requested_at=DAWN - 7200 * 1_000_000, model="earlier"))

    summed = ibexctl("trace", "stats", "--since", "2h", "--json").data
    assert (summed["by"], summed["since"]) == ("model", 7200.0)
    nobody = {"disconnects": 0, "replays": 0}
    assert summed["stats"] == [
        {"model": "a", "turns": 100, "errors": 0, **nobody, "input_tokens": 5050, "output_tokens": 200, "p50_ms": 50.5,
         "p95_ms": pytest.approx(95, abs=1), "p99_ms": pytest.approx(99, abs=1)},
        {"model": "b", "turns": 1, "errors": 1, **nobody, "input_tokens": None, "output_tokens": None, "p50_ms": None,
         "p95_ms": None, "p99_ms": None},
    ]  # fmt: skip
    by_org = ibexctl("trace", "stats", "--by", "org", "--json").data["stats"]
    assert [(row["org_id"], row["name"], row["turns"]) for row in by_org] == [
        (str(acme.org_id), "acme", 101),
        (str(other.org_id), "other", 1),
    ]
    by_agent = ibexctl("trace", "stats", "--by", "agent", "--org", "other").out.splitlines()
    assert by_agent[0] == "turns\t1 in 1 d"
    assert by_agent[-2].startswith("name\tturns\terrors\t")
    assert by_agent[-1].startswith("other's agent\t1\t1\t")
    assert by_agent[-1].endswith(f"\t████████████\t{other.agent_id}")
    assert ibexctl("trace", "stats", "--agent", acme.agent_id, "--since", "1s", "--json").data["stats"] == []


def test_sums_say_how_turns_ended_with_which_errors_and_when(ibexctl, on_stores, tenants) -> None:
    acme, other = tenants
    failed = {"outcome": Outcome.PROVIDER_ERROR, "has_checkpoint": False, "is_complete": False, "status_code": 504}
    failed |= {"total_tokens": None}
    hour = 3600 * 1_000_000
    record(
        on_stores,
        *(acme.make_turn(requested_at=DAWN, total_tokens=10) for _ in range(6)),
        acme.make_turn(requested_at=DAWN, error_code="PROVIDER_TIMEOUT", **failed),
        *(acme.make_turn(requested_at=DAWN - hour, total_tokens=5) for _ in range(2)),
        other.make_turn(requested_at=DAWN),
    )
    summed = ibexctl("trace", "stats", "--by", "hour", "--org", "acme", "--since", "6h", "--json").data
    assert [row["turns"] for row in summed["stats"]] == [2, 7], "oldest first"
    assert summed["outcomes"] == {"ok": 8, "provider_error": 1}
    assert summed["errors"] == {"PROVIDER_TIMEOUT": 1}
    slots = summed["timeline"]["slots"]
    assert len(slots) * summed["timeline"]["slot_seconds"] == 6 * 3600
    assert [slot["turns"] for slot in slots if slot["turns"]] == [2, 7]
    assert sum(slot["tokens"] for slot in slots) == 70
    by_outcome = ibexctl("trace", "stats", "--by", "outcome", "--org", "acme").out.splitlines()
    assert by_outcome[3] == "outcomes\tok 8 (88.9%), provider_error 1 (11.1%)"
    assert by_outcome[4] == "errors\tPROVIDER_TIMEOUT 1"
    assert [line.split("\t")[0] for line in by_outcome[-2:]] == ["ok", "provider_error"]


def test_a_session_that_is_not_there_is_said(ibexctl, tenants) -> None:
    refused = ibexctl("session", "show", "nothing", "--agent", tenants[0].agent_id, "--json").error
    assert "has no session of this name" in refused["message"]
    assert refused["hint"]


def test_traces_are_listed_newest_first_and_by_whose_they_are(ibexctl, on_stores, tenants) -> None:
    acme, other = tenants
    ours = [acme.make_turn(f"s-{k % 2}", requested_at=DAWN + k * 1000) for k in range(4)]
    theirs = other.make_turn("s-0", requested_at=DAWN + 9_000)
    record(on_stores, *ours, theirs)

    def listed(*words: object) -> list[str]:
        return [trace["turn_id"] for trace in ibexctl("trace", "list", *words, "--json").data["traces"]]

    newest_first = [str(turn.turn_id) for turn in (theirs, *reversed(ours))]
    assert listed() == newest_first
    assert listed("--limit", 2) == newest_first[:2]
    assert listed("--org", "acme") == newest_first[1:]
    assert listed("--org", other.org_id) == newest_first[:1]
    assert listed("--agent", acme.agent_id, "--session", "s-1") == [str(ours[3].turn_id), str(ours[1].turn_id)]
    assert listed("--session", "none") == []


def test_a_trace_is_shown_by_turn_and_by_request_with_its_stages(ibexctl, on_stores, tenants) -> None:
    acme, _ = tenants
    request_id = uuid4()
    latencies = {
        "auth_latency_us": 100,
        "rate_limit_latency_us": 200,
        "directive_latency_us": 50,
        "overhead_latency_us": 500,
        "provider_ttfb_ms": 40.0,
        "total_latency_ms": 100.0,
    }
    turns = [
        acme.make_turn(request_id=request_id, requested_at=DAWN, **latencies),
        acme.make_turn(
            request_id=request_id, requested_at=DAWN + 1000, outcome=Outcome.PROVIDER_ERROR, has_checkpoint=False
        ),
    ]
    record(on_stores, *turns)
    [trace] = ibexctl("trace", "show", turns[0].turn_id, "--json").data["traces"]
    assert trace["requested_at"] == DAWN_WRITTEN
    assert trace["auth_latency_us"] == 100
    assert [(stage["name"], stage["start_ms"], stage["duration_ms"]) for stage in trace["stages"]] == [
        ("auth", 0, 0.1),
        ("rate_limit", 0.1, 0.2),
        ("directive", 0.3, 0.05),
        ("proxy", 0.35, 0.15),
        ("provider", 0.5, 40.0),
        ("relay", 40.5, 59.5),
    ]
    both = ibexctl("trace", "show", request_id, "--json").data["traces"]
    assert [row["outcome"] for row in both] == ["ok", "provider_error"]
    lines = ibexctl("trace", "show", turns[0].turn_id).out.splitlines()
    assert lines[-2].split("\t")[:2] == ["relay", "59.500 ms"]
    assert "█" in lines[-2]


def test_a_trace_that_is_not_there_is_said(ibexctl, tenants) -> None:
    nobody = uuid4()
    assert ibexctl("trace", "show", nobody, "--json").error["message"] == (
        f"There is no trace of a turn or request {nobody}."
    )


def test_a_turn_that_never_reached_the_provider_has_no_provider_stage() -> None:
    trace = {
        "auth_latency_us": 10,
        "rate_limit_latency_us": 0,
        "directive_latency_us": 0,
        "overhead_latency_us": 5,
        "provider_ttfb_ms": None,
        "total_latency_ms": 0.02,
    }
    assert [stage["name"] for stage in stages(trace)] == ["auth", "rate_limit", "directive", "proxy"]
    assert all(stage["duration_ms"] >= 0 for stage in stages(trace))
