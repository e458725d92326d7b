"""`ibexctl org export` and `org erase`: all of one organization, nothing of another, and nothing left."""

import asyncio
import json
import os
import stat
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
import redis

from ibex.domain.directives import DirectiveMode
from ibex.domain.identity import DEV_ORG_ID, AgentId, OrgId, TokenId
from ibex.domain.turns import encode_turn
from ibex.recorder.ledger import Batch, Ledger, Place, Refusal
from ibex.runtime import clickhouse_migrator
from ibex.stores.clickhouse.traces import TraceStore
from ibex.stores.postgres.directives import DirectiveAdmin
from ibex.stores.postgres.identity_admin import IdentityAdmin
from ibex.stores.postgres.pool import Postgres
from ibex.stores.postgres.sessions import SessionStore
from ibex.stores.redis.idempotency import idempotency_key
from tests.conftest import run_clickhouse
from tests.ibexctl.conftest import Run
from tests.tenants import make_tenant
from tests.turns import make_turn

TURNS = 30


@pytest.fixture
def orgs(ibexctl: Run, on_stores: Mapping[str, str], data_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two organizations with rows in every table of both stores, keys in Redis, and a dead letter each."""
    made = asyncio.run(make_orgs(on_stores))
    with redis.from_url(on_stores["IBEX_REDIS_URL"]) as client:
        for org in made:
            client.set(f"ibex:rate:{{{org['org_id']}}}", 1)
            client.set(f"ibex:rate:{{{org['org_id']}}}:{org['agent_id']}", 1)
            client.set(idempotency_key(OrgId(UUID(org["org_id"])), TokenId(UUID(org["token_id"])), "key"), 1)
    put_aside(data_dir / "journal", made)
    return made[0], made[1]


async def make_orgs(stores: Mapping[str, str]) -> list[dict[str, Any]]:
    owner = await Postgres.connect(stores["IBEX_POSTGRES_ADMIN_DSN"], name="test owner")
    made = []
    for name in ("acme", "bolt"):
        tenant = await make_tenant(IdentityAdmin(owner), name)
        await IdentityAdmin(owner).set_limit(tenant.org_id, 7)
        await DirectiveAdmin(owner).set(tenant.agent_id, f"You work for {name}.", DirectiveMode.SYSTEM_FIRST)
        ids = {key: str(getattr(tenant, key)) for key in ("org_id", "user_id", "agent_id", "token_id")}
        made.append({"name": name, **ids})
    await owner.close()
    async with clickhouse_migrator(stores["IBEX_CLICKHOUSE_DSN"]) as migrator:
        await migrator.up()
    await record(stores, made)
    return made


@asynccontextmanager
async def opened(stores: Mapping[str, str]) -> AsyncIterator[tuple[SessionStore, TraceStore]]:
    postgres = await Postgres.connect(stores["IBEX_POSTGRES_DSN"], name="test")
    traces = TraceStore(stores["IBEX_CLICKHOUSE_DSN"])
    try:
        yield SessionStore(postgres), traces
    finally:
        await traces.close()
        await postgres.close()


def turn_of(org: Mapping[str, Any], **changes: Any) -> Any:
    return make_turn(org_id=OrgId(UUID(org["org_id"])), agent_id=AgentId(UUID(org["agent_id"])), **changes)


async def record(stores: Mapping[str, str], orgs: list[dict[str, Any]]) -> None:
    async with opened(stores) as (sessions, traces):
        for org in orgs:
            turns = [turn_of(org, external_id=f"s-{number % 4}", messages=b'"hi"') for number in range(TURNS)]
            await sessions.record(turns)
            await traces.insert(turns, org["name"])


def put_aside(journal: Path, orgs: list[dict[str, Any]]) -> None:
    journal.mkdir(mode=0o700, parents=True)
    ledger = Ledger(journal)
    refusals = [Refusal("s", start, None, "refused", encode_turn(turn_of(org))) for start, org in enumerate(orgs)]
    ledger.finish("postgres", Batch((Place("s", 0, 9),), 0.0), refusals)
    ledger.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def find_in_postgres(dsn: str, text: str) -> dict[str, int]:
    """The tables in which some row has this text, and how many rows do."""
    connection = await asyncpg.connect(dsn)
    try:
        names = await connection.fetch("select tablename from pg_tables where schemaname = 'ibex_core'")
        counts = {
            row[0]: await connection.fetchval(
                f"select count(*) from ibex_core.{row[0]} as t where t::text like $1", f"%{text}%"
            )
            for row in names
        }
    finally:
        await connection.close()
    return {name: count for name, count in counts.items() if count}


def find_in_clickhouse(dsn: str, text: str) -> dict[str, int]:
    names = run_clickhouse(dsn, "select name from system.tables where database = currentDatabase() format TSV").split()
    counts = {
        name: int(
            run_clickhouse(
                dsn, f"select countIf(position(concat(*::String), '{text}') > 0) from (select tuple(*) from {name})"
            )
        )
        for name in names
    }
    return {name: count for name, count in counts.items() if count}


def test_an_export_is_everything_of_one_organization_and_nothing_of_another(
    ibexctl: Run, orgs: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    acme, bolt = orgs
    done = ibexctl("org", "export", "acme", "--to", tmp_path / "out", "--json")
    assert done.code == 0, done
    ones = ("organizations", "users", "agents", "tokens", "limits", "directives", "directive_versions")
    many = {"sessions": 4, "checkpoints": TURNS, "traces": TURNS, "audit_events": 5}
    assert done.data["rows"] == dict.fromkeys(ones, 1) | many
    files = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert files.keys() == {f"{kind}.jsonl" for kind in done.data["rows"]}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files.values()} == {0o600}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700
    rows = {name: read_lines(path) for name, path in files.items()}
    assert {row["org_id"] for lines in rows.values() for row in lines} == {acme["org_id"]}
    everything = "".join(path.read_text() for path in files.values())
    assert bolt["org_id"] not in everything
    assert "digest" not in rows["tokens.jsonl"][0]
    checkpoints = [row for row in rows["checkpoints.jsonl"] if row["session_id"]]
    by_session = [[row["turn_index"] for row in checkpoints if row["session_id"] == one] for one in sessions_of(rows)]
    assert sorted(by_session) == sorted([[*range(8)], [*range(8)], [*range(7)], [*range(7)]])
    assert {row["messages"] for row in checkpoints} == {'"hi"'}
    assert {row["turn_id"] for row in checkpoints} == {row["turn_id"] for row in rows["traces.jsonl"]}


def sessions_of(rows: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    return [row["session_id"] for row in rows["sessions.jsonl"]]


def test_an_export_to_standard_output_is_the_same_rows(
    ibexctl: Run, orgs: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    done = ibexctl("org", "export", orgs[0]["org_id"], "--to", "-")
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert [line["kind"] for line in lines].count("traces") == TURNS
    assert f"{TURNS} checkpoints" in done.err
    refused = ibexctl("org", "export", "acme", "--to", "-", "--json")
    assert refused.error["hint"] == "Give a directory: --to DIR."


def test_an_export_overwrites_nothing(
    ibexctl: Run, orgs: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    refused = ibexctl("org", "export", "acme", "--to", tmp_path, "--json")
    assert "is not empty" in refused.error["message"]
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def export_lines(ibexctl: Run, org: str) -> list[str]:
    """An export without the audit events, to which each export adds one."""
    lines = ibexctl("org", "export", org, "--to", "-").out.splitlines()
    return [line for line in lines if json.loads(line)["kind"] != "audit_events"]


def exports_of(ibexctl: Run) -> list[dict[str, Any]]:
    """What the audit says of exports, the latest first."""
    events = ibexctl("audit", "list", "--json").data["audit_events"]
    return [event["details"] for event in events if event["action"] == "export"]


def test_an_export_leaves_an_audit_event_with_its_counts(
    ibexctl: Run, orgs: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    done = ibexctl("org", "export", "acme", "--to", tmp_path / "out", "--json")
    assert exports_of(ibexctl) == [{"rows": done.data["rows"], "is_whole": True}]


def test_an_export_that_fails_leaves_an_audit_event_and_no_file(
    ibexctl: Run, orgs: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = os.environ["IBEX_CLICKHOUSE_DSN"]
    for directory, is_kept in ((tmp_path / "new", False), (tmp_path / "old", True)):
        if is_kept:
            directory.mkdir(mode=0o700)
        monkeypatch.setenv("IBEX_CLICKHOUSE_DSN", "http://127.0.0.1:1")
        assert ibexctl("org", "export", "acme", "--to", directory, "--json").code != 0
        assert directory.exists() == is_kept
        assert not is_kept or list(directory.iterdir()) == []
        monkeypatch.setenv("IBEX_CLICKHOUSE_DSN", good)
        noted = exports_of(ibexctl)[0]
        assert (noted["is_whole"], noted["rows"]["checkpoints"], "traces" in noted["rows"]) == (False, TURNS, False)
        assert ibexctl("org", "export", "acme", "--to", directory, "--json").code == 0


def test_a_directory_that_others_can_enter_or_that_holds_a_killed_export_is_refused(
    ibexctl: Run, orgs: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    directory = tmp_path / "mine"
    directory.mkdir()
    directory.chmod(0o750)
    refused = ibexctl("org", "export", "acme", "--to", directory, "--json")
    assert "mode 700" in refused.error["hint"]
    (directory / "checkpoints.jsonl.partial").write_text("half")
    refused = ibexctl("org", "export", "acme", "--to", directory, "--json")
    assert "checkpoints.jsonl.partial" in refused.error["message"]
    assert [path.name for path in directory.iterdir()] == ["checkpoints.jsonl.partial"]
    refused = ibexctl("org", "export", "acme", "--to", directory / "checkpoints.jsonl.partial", "--json")
    assert "is no directory" in refused.error["message"]


async def test_traces_are_scanned_page_by_page(clickhouse_dsn: str) -> None:
    async with clickhouse_migrator(clickhouse_dsn) as migrator:
        await migrator.up()
    traces, org_id = TraceStore(clickhouse_dsn), OrgId(uuid4())
    moment = make_turn().requested_at
    turns = [make_turn(org_id=org_id, agent_id=uuid4(), requested_at=moment) for _ in range(5)]
    turns += [make_turn(org_id=org_id, requested_at=moment + number // 3) for number in range(20)]
    await traces.insert([*turns, make_turn()], "token")
    for page in (1, 4, 25, 26, 5000):
        found = [row["turn_id"] async for row in traces.scan(org_id, page=page)]
        assert sorted(found) == sorted(turn.turn_id for turn in turns), page
    await traces.close()


def test_an_erasure_leaves_an_audit_event_a_tombstone_and_the_neighbours(
    ibexctl: Run, on_stores: Mapping[str, str], orgs: tuple[dict[str, Any], dict[str, Any]], data_dir: Path
) -> None:
    acme, bolt = orgs
    neighbour = export_lines(ibexctl, "bolt")
    done = ibexctl("org", "erase", "acme", "--yes", "--json")
    assert done.code == 0, done
    assert done.data == {
        "org_id": acme["org_id"],
        "checkpoints": TURNS,
        "sessions": 4,
        "traces": TURNS,
        "redis_keys": 3,
        "dead_letters": 1,
    }
    left = asyncio.run(find_in_postgres(on_stores["IBEX_POSTGRES_ADMIN_DSN"], acme["org_id"]))
    assert left.pop("changes") > 0, "what must be heard everywhere, by id; gone after 48 h"
    assert left == {"audit_events": 1}
    assert find_in_clickhouse(on_stores["IBEX_CLICKHOUSE_DSN"], acme["org_id"]) == {"erased_organizations": 1}
    for key in ("agent_id", "user_id", "token_id"):
        left = asyncio.run(find_in_postgres(on_stores["IBEX_POSTGRES_ADMIN_DSN"], acme[key]))
        assert left.keys() == {"changes"}, key
    with redis.from_url(on_stores["IBEX_REDIS_URL"]) as client:
        keys = list(client.scan_iter())
    assert len(keys) == 3
    assert all(bolt["org_id"].encode() in key for key in keys)
    ledger = Ledger(data_dir / "journal")
    assert len(ledger.dead_letters()) == 1
    ledger.close()
    assert export_lines(ibexctl, "bolt") == neighbour
    (event,) = [
        event for event in ibexctl("audit", "list", "--json").data["audit_events"] if event["org_id"] == acme["org_id"]
    ]
    assert (event["actor"], event["action"], event["details"]) == ("operator", "erase", {})
    assert [org["name"] for org in ibexctl("org", "list", "--json").data["organizations"]] == ["bolt"]
    reconciled = ibexctl("reconcile", "--settle", "1s", "--since", "10m", "--json")
    assert reconciled.data["is_consistent"], reconciled


def test_an_erasure_that_was_cut_short_goes_on(
    ibexctl: Run,
    on_stores: Mapping[str, str],
    orgs: tuple[dict[str, Any], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    acme = orgs[0]
    good = on_stores["IBEX_REDIS_URL"]
    monkeypatch.setenv("IBEX_REDIS_URL", "redis://127.0.0.1:1/0")
    assert "Redis is away" in ibexctl("org", "erase", "acme", "--yes", "--json").error["message"]
    assert ibexctl("org", "show", "acme", "--json").data["status"] == "erasing"
    for words in (("org", "resume", "acme"), ("token", "mint", "--org", "acme"), ("org", "limit", "acme", "--rpm", 3)):
        assert "is being erased" in ibexctl(*words, "--json").error["message"], words
    monkeypatch.setenv("IBEX_REDIS_URL", good)
    assert ibexctl("org", "erase", "acme", "--yes", "--json").data["redis_keys"] == 3
    again = ibexctl("org", "erase", acme["org_id"], "--yes", "--json")
    assert again.data["traces"] == again.data["redis_keys"] == 0
    unknown = ibexctl("org", "erase", uuid4(), "--yes", "--json")
    assert "There is no organization" in unknown.error["message"]


def test_traces_that_a_backup_brought_back_are_erased_again(
    ibexctl: Run, on_stores: Mapping[str, str], orgs: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    acme = orgs[0]
    assert ibexctl("org", "erase", "acme", "--yes").code == 0

    async def bring_back() -> None:
        async with opened(on_stores) as (_, traces):
            await traces.insert([turn_of(acme)], "brought back")

    asyncio.run(bring_back())
    assert ibexctl("org", "erase", acme["org_id"], "--yes", "--json").data["traces"] == 1
    assert "acme" not in ibexctl("org", "list").out


def test_nobody_is_erased_by_mistake(ibexctl: Run, orgs: tuple[dict[str, Any], dict[str, Any]]) -> None:
    refused = ibexctl("org", "erase", "acme", "--json")
    assert refused.error["hint"] == "Give --yes."
    assert ibexctl("org", "show", "acme", "--json").data["status"] == "active"
    assert ibexctl("migrate", "up", "--seed").code == 0
    refused = ibexctl("org", "erase", DEV_ORG_ID, "--yes", "--json")
    assert "made anew at each start" in refused.error["message"]
