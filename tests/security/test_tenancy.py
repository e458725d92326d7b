"""Tenancy at rest: whatever the stores ask in one organization's name, another's rows can be neither read, written,
counted nor guessed from an error.

Each statement is asked twice in organization A's name, with B's ids and with ids that nobody has: if the two outcomes
are the same, then B might as well not exist.
"""

import inspect
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from importlib import import_module
from pkgutil import iter_modules
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

import ibex.stores
from ibex.domain.identity import AgentId, OrgId, UserId
from ibex.errors import UnknownEntity
from ibex.stores.clickhouse.schema import ClickHouseSchema
from ibex.stores.clickhouse.stats import Scope, TraceStats
from ibex.stores.clickhouse.traces import TraceStore
from ibex.stores.counts import count_checkpoints, count_traces
from ibex.stores.export import export_organization
from ibex.stores.migrations import Migrator, find_migrations
from ibex.stores.postgres import roles, sessions
from ibex.stores.postgres.audit import AuditedStore
from ibex.stores.postgres.changes import prune_changes
from ibex.stores.postgres.directives import DirectiveReader
from ibex.stores.postgres.identity import IdentityReader
from ibex.stores.postgres.identity_admin import IdentityAdmin
from ibex.stores.postgres.identity_directory import IdentityDirectory
from ibex.stores.postgres.pool import Postgres
from ibex.stores.postgres.sessions import AGENT_GONE, SessionStore
from ibex.stores.tallies import Period
from tests.conftest import PostgresDatabase
from tests.stores.postgres.test_schema import TENANT_TABLES
from tests.tenants import Tenant, make_tenant

Statement = tuple[str, tuple[Any, ...]]
Outcome = tuple[str, str]

ALWAYS = Period(datetime(2000, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC))

OF_ALL = {"select ibex_core.list_org_ids()", "select ibex_core.prune_changes($1)"}
"""Statements about no organization: the ids of all, which the sweeper needs, and old changes, which have none."""

MINTED = {"org_id", "user_id", "agent_id", "token_id", "limit_id", "session_id", "turn_id", "audit_event_id"}
"""Ids that ibex mints or derives: who presents one cannot have chosen it."""


class Stranger:
    """An organization A at the door of B, on a connection of the application's role."""

    def __init__(self, connection: "asyncpg.Connection[asyncpg.Record]", ours: Tenant, theirs: Tenant) -> None:
        self._connection = connection
        self.ours = ours
        self.theirs = theirs
        self._fresh: dict[object, UUID] = {}

    async def ask(self, statement: str, args: Iterable[Any] = ()) -> Outcome:
        """What comes of it in A's name, committed: its rows, or the error's state and constraint."""
        connection = self._connection
        await connection.execute("begin")
        await connection.execute(f"select set_config('ibex.org_ids', '{self.ours.org_id}', true)")
        try:
            rows = await connection.fetch(statement, *args)
        except asyncpg.PostgresError as error:
            await connection.execute("rollback")
            return f"error {error.sqlstate}", str(getattr(error, "constraint_name", None))
        await connection.execute("commit")
        return "rows", str(sorted(str(tuple(row.values())) for row in rows))

    async def ask_of_nobody(self, statement: str, args: Iterable[Any] = ()) -> Outcome:
        """The same with every id of B's replaced by one that nobody has."""
        kind, text = await self.ask(statement, [self._replaced(value) for value in args])
        for theirs, fresh in self._fresh.items():
            text = text.replace(str(fresh), str(theirs))
        return kind, text

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [self._replaced(item) for item in value]
        is_id = isinstance(value, UUID) and value not in {self.ours.org_id, self.ours.agent_id}
        return self._fresh.setdefault(value, uuid4()) if is_id else value


@pytest.fixture
async def stranger(tenants: tuple[Tenant, Tenant], postgres_database: PostgresDatabase) -> AsyncIterator[Stranger]:
    """A and B, each with rows in every table."""
    connection = await asyncpg.connect(postgres_database.dsn)
    yield Stranger(connection, *tenants)
    await connection.close()


async def rows_of(owner: Postgres, tenant: Tenant) -> dict[str, str]:
    """Every row of an organization, as the owner sees it."""
    async with owner.transaction() as connection:
        return {
            table: str(await connection.fetch(f"select * from ibex_core.{table} where org_id = $1 order by 1", org))
            for table in TENANT_TABLES
            for org in [tenant.org_id]
        }


async def test_no_row_of_another_organization_is_read_written_or_counted(
    stranger: Stranger, owner: Postgres, subtests: pytest.Subtests
) -> None:
    theirs = stranger.theirs.org_id
    before = await rows_of(owner, stranger.theirs)
    for table in TENANT_TABLES:
        name = f"ibex_core.{table}"
        async with owner.transaction() as connection:
            row = await connection.fetchval(f"select to_jsonb(t) from {name} as t where org_id = $1 limit 1", theirs)
        record = f"jsonb_populate_record(null::{name}, $2::jsonb || jsonb_build_object('org_id', $1::uuid))"
        for title, statement, args in (
            ("read", f"select * from {name} where org_id = $1", ()),
            ("count", f"select count(*) from {name} where org_id = $1", ()),
            ("update", f"update {name} set org_id = org_id where org_id = $1 returning *", ()),
            ("delete", f"delete from {name} where org_id = $1 returning *", ()),
            ("lock", f"select * from {name} where org_id = $1 for update", ()),
            ("move into", f"update {name} set org_id = $1 returning 1", ()),
            ("copy", f"insert into {name} select * from {record} returning 1", (row,)),
        ):
            with subtests.test(f"{table}: {title}"):
                outcome = await stranger.ask(statement, [theirs, *args])
                assert outcome == await stranger.ask_of_nobody(statement, [theirs, *args])
                assert outcome[0] == "error 42501" or outcome in {("rows", "[]"), ("rows", "['(0,)']")}
    assert await rows_of(owner, stranger.theirs) == before


async def run_every_method(postgres: Postgres, tenant: Tenant) -> set[object]:
    """Have the stores ask all they can ask as the application, of this tenant; the functions that were called."""
    called = set[object]()

    async def call(function: Any, *args: Any) -> None:
        called.add(getattr(function, "__func__", function))
        await function(*args)

    reader, store = IdentityReader(postgres), SessionStore(postgres)
    await call(reader.find_credential, tenant.token_id, tenant.agent_id)
    await call(reader.find_credentials, [(tenant.org_id, tenant.token_id, tenant.agent_id)])
    await call(reader.mark_used, [(tenant.org_id, tenant.token_id)])
    await call(reader.has_development_token)
    await call(DirectiveReader(postgres).in_force, tenant.org_id, tenant.agent_id)
    await call(store.record, [tenant.make_turn("s-2"), tenant.make_turn("s-2", agent_id=uuid4())])
    await call(store.abandon_idle, timedelta())
    await call(store.expire, timedelta(days=1))
    await call(store.list_sessions, tenant.org_id, tenant.agent_id)
    await call(store.tally, ALWAYS)
    await call(store.find_turns, tenant.org_id, ALWAYS)
    with pytest.raises(UnknownEntity):
        await call(store.show, "s-2", tenant.agent_id)
    await call(count_checkpoints, postgres, tenant.org_id)
    await call(prune_changes, postgres)
    await call(roles.read_rights, postgres)
    return called


@pytest.fixture
async def asked(tenants: tuple[Tenant, Tenant], postgres_database: PostgresDatabase) -> list[Statement]:
    """Every statement that the stores ask as the application, as they asked it of B."""
    found = list[Statement]()
    postgres = await Postgres.connect(postgres_database.dsn, name="listened to", max_size=1)
    async with postgres.transaction() as connection:
        connection.add_query_logger(lambda query: found.append((query.query, tuple(query.args))))
    await run_every_method(postgres, tenants[1])
    await postgres.close()
    return [(sql, args) for sql, args in found if "ibex_core" in sql]


async def test_no_statement_of_the_stores_tells_another_organization_from_nobody(
    stranger: Stranger, asked: list[Statement], owner: Postgres, subtests: pytest.Subtests
) -> None:
    assert len({sql for sql, _ in asked}) >= 15
    before = await rows_of(owner, stranger.theirs)
    ids = {str(getattr(stranger.theirs, name)) for name in ("org_id", "user_id", "agent_id", "token_id")}
    for sql, args in asked:
        with subtests.test(sql.strip().splitlines()[0]):
            outcome = await stranger.ask(sql, args)
            assert outcome == await stranger.ask_of_nobody(sql, args)
            assert sql in OF_ALL or not any(one in outcome[1] for one in ids)
    assert await rows_of(owner, stranger.theirs) == before


async def test_every_method_that_reaches_postgres_is_among_those_asked(app: Postgres, tenant: Tenant) -> None:
    called = await run_every_method(app, tenant)
    for cls in (IdentityReader, DirectiveReader, SessionStore):
        methods = {function for name, function in inspect.getmembers(cls, inspect.isfunction) if name[0] != "_"}
        assert methods <= called, cls
    known = {IdentityReader, DirectiveReader, SessionStore, *called, export_organization, roles.refuse_powerful_role}
    for module in (import_module(f"ibex.stores.{found.name}") for found in iter_modules(ibex.stores.__path__)):
        for name, taker in vars(module).items():
            if getattr(taker, "__module__", None) == module.__name__ and takes_postgres(taker):
                is_owners = isinstance(taker, type) and issubclass(taker, AuditedStore | IdentityDirectory)
                assert taker in known or is_owners, f"{name} is asked nothing here"


def takes_postgres(taker: object) -> bool:
    function = taker.__init__ if isinstance(taker, type) else taker  # type: ignore[misc]
    return inspect.isfunction(function) and Postgres in inspect.get_annotations(function).values()


async def test_another_organizations_agent_is_as_good_as_none(app: Postgres, tenants: tuple[Tenant, Tenant]) -> None:
    ours, theirs = tenants
    nobody = AgentId(uuid4())
    turns = [ours.make_turn("s-9", agent_id=agent) for agent in (theirs.agent_id, nobody)]
    assert [reason for _, reason in (await SessionStore(app).record(turns)).refused] == [AGENT_GONE] * 2
    reader = IdentityReader(app)
    found = [await reader.find_credential(ours.token_id, agent) for agent in (theirs.agent_id, nobody)]
    assert found[0] is not None
    assert found[1] == replace(found[0], agent_id=nobody)
    assert found[0].agent_status is None


async def test_the_recorders_batch_passes_for_its_own_organizations_alone(
    app: Postgres, owner: Postgres, admin: IdentityAdmin, tenants: tuple[Tenant, Tenant], stranger: Stranger
) -> None:
    third = await make_tenant(admin, "third")
    turns = [tenant.make_turn("batch") for tenant in (*tenants, third)]
    result = await SessionStore(app).record(turns)
    assert (result.written, result.sessions_created) == (3, 3)
    before = await rows_of(owner, third)
    turn = third.make_turn("batch")
    for org_ids in ([tenants[0].org_id], [tenants[0].org_id, tenants[1].org_id]):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await insert_session(stranger._connection, org_ids, turn.session_id, third)
    assert await rows_of(owner, third) == before


async def insert_session(
    connection: "asyncpg.Connection[asyncpg.Record]", org_ids: list[OrgId], session_id: UUID, tenant: Tenant
) -> None:
    async with connection.transaction():
        await connection.execute("select set_config('ibex.org_ids', $1, true)", ",".join(map(str, org_ids)))
        columns = [[session_id], [tenant.org_id], [tenant.agent_id], ["batch"], [0]]
        await connection.execute(sessions.UPSERT_SESSIONS, *columns)


async def test_no_constraint_spans_organizations_but_on_ids_that_ibex_mints(owner: Postgres) -> None:
    async with owner.transaction() as connection:
        uniques = await connection.fetch(
            """
            select i.indexrelid::regclass::text as name, a.attname as first_column
            from pg_index as i join pg_class as c on c.oid = i.indrelid
            join pg_attribute as a on a.attrelid = c.oid and a.attnum = i.indkey[0]
            where i.indisunique and c.relnamespace = 'ibex_core'::regnamespace and c.relname = any ($1::text[])
            """,
            TENANT_TABLES,
        )
        references = await connection.fetch(
            """
            select c.conrelid::regclass::text || '.' || c.conname as name,
                exists (select from pg_attribute as a
                        where a.attrelid = c.conrelid and a.attnum = any (c.conkey) and a.attname = 'org_id') as carries
            from pg_constraint as c
            where c.contype = 'f' and c.connamespace = 'ibex_core'::regnamespace
            """
        )
    assert len(uniques) >= len(TENANT_TABLES)
    assert [row["name"] for row in uniques if row["first_column"] not in MINTED] == []
    assert references
    assert [row["name"] for row in references if not row["carries"]] == []


async def test_what_one_organization_calls_its_own_another_may_call_so_too(admin: IdentityAdmin) -> None:
    names = [await make_tenant(admin, "the same") for _ in range(2)]
    assert len({tenant.org_id for tenant in names}) == 2
    for tenant in names:
        await admin.create_user(tenant.org_id, "the same")
        await admin.register_agent(tenant.org_id, "the same")
        await admin.mint_token(tenant.org_id, name="the same", user=UserId(tenant.user_id))


async def everything(rows: AsyncIterator[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row async for row in rows]


async def test_no_trace_is_read_without_its_organization(
    tenants: tuple[Tenant, Tenant], clickhouse_dsn: str, subtests: pytest.Subtests
) -> None:
    ours, theirs = tenants
    schema = ClickHouseSchema(clickhouse_dsn)
    await Migrator(schema, find_migrations("clickhouse")).up()
    await schema.close()
    store = await TraceStore.connect(clickhouse_dsn)
    turn = theirs.make_turn()
    await store.insert([turn, ours.make_turn()], "both")
    disguised = theirs.make_turn(turn_id=turn.turn_id, org_id=ours.org_id)

    def scope(org_ids: list[OrgId]) -> Scope:
        return Scope(org_ids=org_ids, since=timedelta(1), agent=theirs.agent_id)

    questions = {
        TraceStore.list: lambda org: store.list(org_ids=org, agent=theirs.agent_id),
        TraceStore.show: lambda org: store.show(turn.turn_id, org_ids=org),
        TraceStats.sum_up: lambda org: store.stats.sum_up(scope(org), by="agent_id"),
        TraceStats.count_errors: lambda org: store.stats.count_errors(scope(org)),
        TraceStats.draw: lambda org: store.stats.draw(scope(org), 4),
        TraceStore.scan: lambda org: everything(store.scan(org[0])),
        TraceStore.tally: lambda org: store.tally(org, ALWAYS),
        TraceStore.find_turns: lambda org: store.find_turns(org[0], ALWAYS),
        TraceStore.find: lambda org: store.find([turn if org == [theirs.org_id] else disguised]),
    }
    methods = {
        function
        for readers in (TraceStore, TraceStats)
        for name, function in inspect.getmembers(readers, inspect.isfunction)
        if name[0] != "_"
    }
    assert methods - set(questions) == {TraceStore.insert, TraceStore.ping, TraceStore.close}
    for method, question in questions.items():
        with subtests.test(method.__name__):
            parameters = inspect.signature(method).parameters
            scopes = {"org_ids", "org_id", "turns", "scope"} & parameters.keys()  # a turn names its organization
            assert [parameters[name].default for name in scopes] == [inspect.Parameter.empty]
            assert str(turn.turn_id)[-8:] in str(await question([theirs.org_id])) or method in {
                TraceStore.tally,
                TraceStats.sum_up,
                TraceStats.count_errors,
                TraceStats.draw,
            }
            seen = str(await question([ours.org_id]))
            assert str(turn.turn_id) not in seen
            assert str(theirs.org_id) not in seen
            assert str(theirs.agent_id) not in seen
    assert await count_traces(clickhouse_dsn, ours.org_id) == await count_traces(clickhouse_dsn, theirs.org_id) == 1
    assert await count_traces(clickhouse_dsn, OrgId(uuid4())) == 0
    await store.close()
