"""Every command that changes something leaves an audit event, in the transaction of the change itself."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import asyncpg
import pytest

from tests.ibexctl.conftest import Run
from tests.ibexctl.test_app import leaves

Facts = Mapping[str, str]
"""The ids and names a command's words may need."""


@dataclass(frozen=True, slots=True)
class Changing:
    """A command that changes something: its words, and the event it must leave."""

    words: Callable[[Facts], list[str]]
    action: str
    kind: str


CHANGING = {
    "org create": Changing(lambda f: ["another"], "create", "organization"),
    "org limit": Changing(lambda f: [f["org"], "--rpm", "7"], "set_limit", "limit"),
    "org suspend": Changing(lambda f: [f["org"]], "set_status", "organization"),
    "org resume": Changing(lambda f: [f["suspended org"]], "set_status", "organization"),
    "user create": Changing(lambda f: ["Ada", "--org", f["org"]], "create", "user"),
    "user suspend": Changing(lambda f: [f["user"]], "set_status", "user"),
    "user resume": Changing(lambda f: [f["suspended user"]], "set_status", "user"),
    "agent register": Changing(lambda f: ["bot", "--org", f["org"]], "register", "agent"),
    "agent limit": Changing(lambda f: [f["agent"], "--rpm", "5"], "set_limit", "limit"),
    "agent pause": Changing(lambda f: [f["agent"]], "set_status", "agent"),
    "agent resume": Changing(lambda f: [f["paused agent"]], "set_status", "agent"),
    "agent suspend": Changing(lambda f: [f["agent"]], "set_status", "agent"),
    "agent archive": Changing(lambda f: [f["agent"]], "set_status", "agent"),
    "token mint": Changing(lambda f: ["--org", f["org"]], "mint", "token"),
    "token revoke": Changing(lambda f: [f["token"]], "revoke", "token"),
    "token rotate": Changing(lambda f: [f["other token"], "--grace", "1h"], "rotate", "token"),
    "directive set": Changing(lambda f: [f["agent"], "--text", "New."], "set", "directive"),
    "directive rollback": Changing(lambda f: [f["agent"], "--version", "1"], "roll_back", "directive"),
    "directive clear": Changing(lambda f: [f["agent"]], "clear", "directive"),
}

IN_STEPS = dict.fromkeys(("org export", "org erase"), "tests/ibexctl/test_org_data.py")
"""Commands of many transactions: their events are looked at there."""

NOT_AUDITED = {
    "bench", "demo crash", "demo cut", "demo hang", "top", "serve", "recorder", "reload", "reconcile", "smoke",
    "status", "version", "migrate up", "migrate down", "migrate status", "config show", "config check",
    "journal status", "journal deliver", "journal dead-letters replay",
}  # fmt: skip
"""Commands about processes, files and schemas, which belong to no tenant."""

READING = {"list", "show", "stats", "history", "diff"}


def test_every_command_is_known_to_change_something_or_not() -> None:
    unknown = {
        name
        for name in map(" ".join, leaves())
        if name not in CHANGING
        and name not in IN_STEPS
        and name not in NOT_AUDITED
        and name.rpartition(" ")[2] not in READING
    }
    assert unknown == set()


async def fetch(dsn: str, statement: str, *values: object) -> list[Any]:
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetch(statement, *values)
    finally:
        await connection.close()


@pytest.fixture
def facts(ibexctl: Run, on_stores: Mapping[str, str]) -> Facts:
    """One of everything a command can change, and of what it can change back."""

    def made(*words: str) -> dict[str, Any]:
        outcome = ibexctl(*words, "--json")
        assert outcome.code == 0, outcome
        data: dict[str, Any] = outcome.data
        return data

    org, suspended_org = made("org", "create", "acme"), made("org", "create", "suspended")
    made("org", "suspend", suspended_org["org_id"])
    suspended_user = made("user", "create", "Eve", "--org", "acme")["user_id"]
    made("user", "suspend", suspended_user)
    agents = [made("agent", "register", name, "--org", "acme")["agent_id"] for name in ("bot", "paused")]
    made("agent", "pause", agents[1])
    for text in ("One.", "Two."):
        made("directive", "set", agents[0], "--text", text)
    return {
        "org": org["org_id"],
        "suspended org": suspended_org["org_id"],
        "user": org["user_id"],
        "suspended user": suspended_user,
        "agent": agents[0],
        "paused agent": agents[1],
        "token": made("token", "mint", "--org", "acme")["prefix"],
        "other token": made("token", "mint", "--org", "acme")["prefix"],
    }


def test_each_change_and_its_audit_event_are_of_one_transaction(ibexctl: Run, facts: Facts, postgres_database) -> None:
    """`xmin` is the transaction that wrote a row, and the triggers note each change under its own."""
    dsn = postgres_database.admin_dsn
    for name, changing in CHANGING.items():
        (before,) = asyncio.run(fetch(dsn, "select max(change_id) from ibex_core.changes"))
        outcome = ibexctl(*name.split(), *changing.words(facts), "--json")
        assert outcome.code == 0, (name, outcome)
        changes = asyncio.run(
            fetch(
                dsn, "select distinct xid::xid::text as xid from ibex_core.changes where change_id > $1", before["max"]
            )
        )
        (event,) = asyncio.run(
            fetch(
                dsn,
                "select xmin::text as xid, actor, action, entity_kind, created_at from ibex_core.audit_events"
                " order by created_at desc limit 1",
            )
        )
        assert [row["xid"] for row in changes] == [event["xid"]], name
        assert (event["actor"], event["action"], event["entity_kind"]) == ("operator", changing.action, changing.kind)


def test_what_cannot_be_audited_is_not_done(ibexctl: Run, facts: Facts, postgres_database) -> None:
    refuse = """
    create function public.refuse() returns trigger language plpgsql as $$ begin raise 'on strike'; end $$;
    create trigger strike before insert on ibex_core.audit_events execute function public.refuse();
    """
    state = "select (select sum(hashtext(t::text)) from {} as t)"
    tables = ("organizations", "users", "agents", "tokens", "limits", "directives", "directive_versions", "changes")

    async def read_state() -> list[Any]:
        return [(await fetch(postgres_database.admin_dsn, state.format(f"ibex_core.{name}")))[0][0] for name in tables]

    async def strike() -> None:
        connection = await asyncpg.connect(postgres_database.superuser_dsn)
        await connection.execute(refuse)
        await connection.close()

    asyncio.run(strike())
    before = asyncio.run(read_state())
    for name, changing in CHANGING.items():
        outcome = ibexctl(*name.split(), *changing.words(facts), "--json")
        assert "Postgres refused" in outcome.error["message"], name
        assert outcome.err == "", name
    assert asyncio.run(read_state()) == before
