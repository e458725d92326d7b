"""Traces in ClickHouse: stored once, read back as they were, and only by who names their organization."""

import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from inspect import Parameter, signature
from uuid import uuid4

import pytest

from ibex.domain.identity import AgentId, OrgId
from ibex.domain.turns import Outcome
from ibex.errors import ConfigurationError, SchemaMismatch, StoreRefused, StoreUnavailable
from ibex.stores.clickhouse.client import ClickHouseAddress
from ibex.stores.clickhouse.schema import ClickHouseSchema
from ibex.stores.clickhouse.stats import Scope
from ibex.stores.clickhouse.traces import TRACE_COLUMNS, TraceStore
from ibex.stores.migrations import Migrator, find_migrations
from ibex.stores.tallies import Period
from tests.turns import AGENT, ORG, make_turn

OTHER = OrgId(uuid4())
OURS = [OrgId(ORG)]


@pytest.fixture
async def traces(clickhouse_dsn: str) -> AsyncIterator[TraceStore]:
    schema = ClickHouseSchema(clickhouse_dsn)
    await Migrator(schema, find_migrations("clickhouse")).up()
    await schema.close()
    store = await TraceStore.connect(clickhouse_dsn)
    yield store
    await store.close()


async def test_a_trace_is_read_back_as_it_was(traces: TraceStore) -> None:
    second = int(time.time())  # of now: what is older than the table's TTL may be gone at once
    turn = make_turn(
        replay_of=uuid4(), directive_version=7, cached_tokens=2**53, error_code="X", model="modèle 'x'\\n", attempts=3,
        requested_at=second * 1_000_000 + 123_456, completed_at=second * 1_000_000 + 1_999_999, auth_latency_us=11,
        rate_limit_latency_us=12, directive_latency_us=13, overhead_latency_us=14, is_streaming=True,
        outcome=Outcome.INCOMPLETE, status_code=499,
    )  # fmt: skip
    await traces.insert([turn], "t")
    (row,) = await traces.list(org_ids=OURS)
    assert tuple(row) == TRACE_COLUMNS
    assert abs((datetime.now(UTC) - row.pop("inserted_at")).total_seconds()) < 60
    assert row.pop("session_id") == turn.external_id
    assert row.pop("requested_at") == datetime.fromtimestamp(second, UTC).replace(microsecond=123_000)
    assert row.pop("completed_at") == datetime.fromtimestamp(second + 1, UTC).replace(microsecond=999_000)
    assert row == {name: getattr(turn, name) for name in row}


async def test_what_is_unknown_is_null_and_not_zero(traces: TraceStore) -> None:
    await traces.insert(
        [make_turn(input_tokens=None, output_tokens=None, total_tokens=None, provider_ttfb_ms=None)], "t"
    )
    (row,) = await traces.list(org_ids=OURS)
    names = ["input_tokens", "output_tokens", "cached_tokens", "total_tokens", "provider_ttfb_ms", "error_code"]
    assert [row[name] for name in names] == [None] * 6
    assert row["replay_of"] is row["directive_version"] is None


async def test_a_batch_sent_twice_is_stored_once(traces: TraceStore) -> None:
    month = 31 * 86_400 * 1_000_000
    turns = [make_turn() for _ in range(100)]
    turns += [make_turn(requested_at=turn.requested_at - month) for turn in turns]
    await traces.insert(turns, "across a month boundary")
    for n in range(20):
        await traces.insert([make_turn(org_id=OTHER)], f"other {n}")
    await traces.insert(turns, "across a month boundary")
    assert len(await traces.list(org_ids=OURS, limit=None)) == 200
    assert await traces.find([*turns, make_turn()]) == {turn.turn_id for turn in turns}


async def test_only_the_organizations_named_are_seen(traces: TraceStore) -> None:
    ours, theirs = make_turn(), make_turn(org_id=OTHER)
    await traces.insert([ours, theirs], "t")
    assert [row["turn_id"] for row in await traces.list(org_ids=OURS)] == [ours.turn_id]
    assert await traces.list(org_ids=[]) == []
    assert len(await traces.list(org_ids=[*OURS, OTHER])) == 2
    assert await traces.show(theirs.turn_id, org_ids=OURS) == []
    assert len(await traces.show(theirs.turn_id, org_ids=[OTHER])) == 1


async def test_ten_thousand_organizations_are_asked_for_at_once(traces: TraceStore) -> None:
    ours, theirs = make_turn(), make_turn(org_id=OTHER)
    await traces.insert([ours, theirs], "t")
    many = [*OURS, *(OrgId(uuid4()) for _ in range(10_000)), OTHER]
    assert {row["turn_id"] for row in await traces.list(org_ids=many)} == {ours.turn_id, theirs.turn_id}
    assert {
        row["turn_id"] for row in await traces.list(org_ids=many, session="s-1", limit=9, agent=AgentId(AGENT))
    } == {
        ours.turn_id,
        theirs.turn_id,
    }
    sums = await traces.stats.sum_up(Scope(org_ids=many, since=timedelta(hours=1)), by="org_id")
    assert {row["org_id"]: row["turns"] for row in sums} == {ORG: 1, OTHER: 1}
    now = datetime.now(UTC)
    assert len(await traces.tally(many, Period(now - timedelta(hours=1), now + timedelta(hours=1)))) == 2


def test_no_query_can_be_asked_without_organizations() -> None:
    for query in (TraceStore.list, TraceStore.show):
        assert signature(query).parameters["org_ids"].default is Parameter.empty


async def test_traces_are_found_by_agent_by_session_and_newest_first(traces: TraceStore) -> None:
    start = make_turn().requested_at
    agent = AgentId(uuid4())
    turns = [
        make_turn(
            requested_at=start + n * 1000, external_id=f"s-{n % 2}", agent_id=agent if n < 10 else AGENT, model=str(n)
        )
        for n in range(60)
    ]
    await traces.insert(turns, "t")

    async def models(**conditions: object) -> list[int]:
        return [int(row["model"]) for row in await traces.list(org_ids=OURS, **conditions)]  # type: ignore[arg-type]

    assert await models() == list(range(59, 9, -1))
    assert await models(limit=3) == [59, 58, 57]
    assert await models(limit=None, is_oldest_first=True) == list(range(60))
    assert await models(agent=agent) == list(range(9, -1, -1))
    assert await models(agent=agent, session="s-1") == [9, 7, 5, 3, 1]
    assert await models(session="' or 1=1 --") == []


async def test_a_trace_is_shown_by_its_turn_id_and_by_its_request_id(traces: TraceStore) -> None:
    request_id = uuid4()
    turns = [make_turn(request_id=request_id), make_turn(request_id=request_id)]
    await traces.insert(turns, "t")
    assert [row["turn_id"] for row in await traces.show(turns[1].turn_id, org_ids=OURS)] == [turns[1].turn_id]
    assert {row["turn_id"] for row in await traces.show(request_id, org_ids=OURS)} == {turn.turn_id for turn in turns}
    assert await traces.show(uuid4(), org_ids=OURS) == []


@pytest.mark.parametrize("fault", [{"input_tokens": -1}, {"attempts": 70_000}])
async def test_a_value_that_fits_no_column_is_refused(traces: TraceStore, fault: dict[str, int]) -> None:
    with pytest.raises(StoreRefused):
        await traces.insert([make_turn(**fault)], "t")
    await traces.insert([make_turn()], "t")
    assert len(await traces.list(org_ids=OURS)) == 1


async def test_a_missing_schema_is_no_fault_of_the_rows(clickhouse_dsn: str) -> None:
    for dsn in (clickhouse_dsn, f"{clickhouse_dsn}_missing"):
        store = await TraceStore.connect(dsn)
        with pytest.raises(StoreUnavailable, match="migrate up"):
            await store.insert([make_turn()], "t")
        await store.close()


async def test_a_wrong_password_is_no_fault_of_the_rows_and_is_not_shown(clickhouse_dsn: str) -> None:
    store = await TraceStore.connect(clickhouse_dsn.replace("@", "Wrong@"))
    with pytest.raises(StoreUnavailable) as caught:
        await store.ping()
    assert "Wrong" not in str(caught.value)
    await store.close()


async def test_a_store_that_is_away_delays_no_start_and_is_used_when_it_is_back(traces: TraceStore) -> None:
    away = await TraceStore.connect("http://user:secret@127.0.0.1:1/ibex")
    with pytest.raises(StoreUnavailable) as caught:
        await away.insert([make_turn()], "t")
    assert "secret" not in f"{caught.value!r} {away!r} {vars(away)!r}"
    await away.close()
    await traces.ping()


@pytest.mark.parametrize(
    ("dsn", "interface", "database"),
    [
        ("http://u:p@h:8123/traces", "http", "traces"),
        ("https://u:p@h/", "https", "ibex"),
        ("clickhouse://h", "http", "ibex"),
        ("clickhouses://u:p@h:9000/a%20b?compress=lz4", "https", "a b"),
    ],
)
def test_a_dsn_says_where_clickhouse_is(dsn: str, interface: str, database: str) -> None:
    address = ClickHouseAddress.parse(dsn)
    assert (address.interface, address.database) == (interface, database)
    assert repr(address) == f"ClickHouseAddress({interface}, database={database})"


@pytest.mark.parametrize("dsn", ["", "localhost:8123", "tcp://h:9000/x", "http:///x"])
def test_a_dsn_that_names_no_clickhouse_is_a_wrong_setting(dsn: str) -> None:
    with pytest.raises(ConfigurationError):
        ClickHouseAddress.parse(dsn)


async def test_the_schema_goes_up_and_down_and_up_again(clickhouse_dsn: str) -> None:
    schema = ClickHouseSchema(f"{clickhouse_dsn}_fresh")
    known = find_migrations("clickhouse")
    migrator = Migrator(schema, known)
    try:
        assert [status.state for status in await migrator.status()] == ["pending"] * len(known)
        with pytest.raises(SchemaMismatch):
            await migrator.check()
        assert await migrator.up() == known
        assert await migrator.up() == []
        await migrator.check()
        assert [await migrator.down() for _ in known] == known[::-1]
        assert [status.state for status in await migrator.status()] == ["pending"] * len(known)
        assert await migrator.up() == known
        applied = await schema.applied()
        assert [(row.number, row.name) for row in applied] == [(one.number, one.name) for one in known]
        assert applied[0].applied_at.tzinfo is not None
        await schema.command(f"drop database {ClickHouseAddress.parse(clickhouse_dsn).database}_fresh")
    finally:
        await schema.close()


async def test_a_changed_migration_is_noticed(clickhouse_dsn: str) -> None:
    schema = ClickHouseSchema(clickhouse_dsn)
    migrations = find_migrations("clickhouse")
    await Migrator(schema, migrations).up()
    changed = [migrations[0]._replace(up_sql="select 1"), *migrations[1:]]
    with pytest.raises(SchemaMismatch):
        await Migrator(schema, changed).check()
    await schema.close()
