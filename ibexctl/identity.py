"""`ibexctl org`, `user` and `agent`: who there is, who may call, and how often."""

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal
from uuid import UUID

import typer

from ibex.domain.identity import AgentId
from ibexctl import arguments
from ibexctl.command import command, group
from ibexctl.operation import change, operate, read_settings
from ibexctl.output import Answer, Fields, Table

if TYPE_CHECKING:
    from ibex.domain.identity import OrgId
    from ibex.runtime import Operator
    from ibex.stores.postgres.identity_directory import IdentityDirectory

organizations = group("Organizations, and how often each may call.")
users = group("Users: the people tokens belong to.")
agents = group("Agents: the callers inside an organization.")

Org = Annotated[str, typer.Argument(metavar="ORG", help="An organization's id, or its name.")]
OrgOption = Annotated[str, typer.Option("--org", metavar="ORG", help="An organization's id, or its name.")]
OrgFilter = Annotated[str | None, typer.Option("--org", metavar="ORG", help="Of this organization alone.")]
Agent = Annotated[UUID, typer.Argument(metavar="AGENT", parser=arguments.identifier, help="The agent's id.")]
AgentOption = Annotated[
    UUID | None, typer.Option("--agent", metavar="AGENT", parser=arguments.identifier, help="An agent's id.")
]
AgentFilter = Annotated[
    UUID | None, typer.Option("--agent", metavar="AGENT", parser=arguments.identifier, help="Of this agent alone.")
]
Limit = Annotated[int, typer.Option("--limit", metavar="N", min=1, max=10_000, help="At most so many.")]
User = Annotated[UUID, typer.Argument(metavar="USER", parser=arguments.identifier, help="The user's id.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="What it is called.")]
Rpm = Annotated[int, typer.Option("--rpm", metavar="N", min=1, max=1_000_000, help="Requests in any 60 s.")]

_A_USER = "00000000-0000-0000-0000-000000000002"
_AN_AGENT = "00000000-0000-0000-0000-000000000003"


@command(organizations, "create", example="ibexctl org create acme")
def create_org(name: Name) -> Answer:
    """Create an organization.

    It starts with a user, Owner, to whom its tokens belong unless another is named, and with the default limit
    IBEX_RATE_LIMIT_RPM. Next it needs an agent and a token.
    """
    row = change(lambda operator: operator.identity.create_org(name))
    return Answer(row, notes=(f"Next: ibexctl agent register NAME --org {row['org_id']}",))


@command(organizations, "list", example="ibexctl org list")
def list_orgs() -> Answer:
    """List every organization, with its limit and how many agents and valid tokens it has."""
    columns = ("org_id", "name", "status", "rpm", "agent_count", "token_count", "created_at")
    settings = read_settings()
    rows = operate(lambda operator: operator.directory.list_orgs(), settings=settings)
    rows = [_with_default_limit(row, settings.rate_limit_rpm) for row in rows]
    table = Table(columns, [[_shown_limit(row)[column] for column in columns] for row in rows])
    return Answer({"organizations": rows}, (table,))


@command(organizations, "show", example="ibexctl org show acme")
def show_org(org: Org) -> Answer:
    """Show one organization: its id, status, limit, and how many agents and valid tokens it has."""

    async def act(operator: "Operator") -> dict[str, Any]:
        return await operator.directory.show_org(await operator.directory.find_org(org))

    settings = read_settings()
    row = _with_default_limit(operate(act, settings=settings), settings.rate_limit_rpm)
    return Answer(row, (Fields(_shown_limit(row)),))


@command(organizations, "limit", example="ibexctl org limit acme --rpm 600")
def limit_org(org: Org, rpm: Rpm, agent: AgentOption = None) -> Answer:
    """Limit the requests of an organization, or of one agent of it, in any 60 s.

    The organization's limit holds for all its agents together, an agent's besides. What is over is answered 429 with
    Retry-After. In force within a second while Redis is up, else within 5 s.
    """

    async def act(operator: "Operator") -> dict[str, Any]:
        org_id = await operator.directory.find_org(org)
        return await operator.identity.set_limit(org_id, rpm, None if agent is None else AgentId(agent))

    return Answer(change(act))


@command(organizations, "suspend", example="ibexctl org suspend acme")
def suspend_org(org: Org) -> Answer:
    """Refuse every token of an organization, until `org resume`.

    At once while Redis is up, within 5 s whatever happens to it; callers are answered 403 ORG_SUSPENDED. Tokens,
    agents and records stay as they are.
    """
    return _change_org_status(org, "suspended")


@command(organizations, "resume", example="ibexctl org resume acme")
def resume_org(org: Org) -> Answer:
    """Let a suspended organization's tokens pass again."""
    return _change_org_status(org, "active")


@command(users, "create", example='ibexctl user create "Ada Lovelace" --org acme')
def create_user(name: Name, org: OrgOption) -> Answer:
    """Create a user in an organization, to whom tokens can belong.

    Tokens of a person who leaves are then refused together: `user suspend`.
    """

    async def act(operator: "Operator") -> dict[str, Any]:
        return await operator.identity.create_user(await operator.directory.find_org(org), name)

    row = change(act)
    return Answer(row, notes=(f"Next: ibexctl token mint --org {row['org_id']} --user {row['user_id']}",))


@command(users, "list", example="ibexctl user list --org acme")
def list_users(org: OrgFilter = None) -> Answer:
    """List users, of all organizations or of one."""
    columns = ("user_id", "org_id", "name", "status", "created_at")
    return listing("users", columns, operate(within(org, lambda directory, org_id: directory.list_users(org_id))))


@command(users, "suspend", example=f"ibexctl user suspend {_A_USER}")
def suspend_user(user: User) -> Answer:
    """Refuse every token of a user, until `user resume`.

    At once while Redis is up, within 5 s whatever happens to it; callers are answered 403 USER_SUSPENDED.
    """
    return _change_status("user", user, "suspended")


@command(users, "resume", example=f"ibexctl user resume {_A_USER}")
def resume_user(user: User) -> Answer:
    """Let a suspended user's tokens pass again."""
    return _change_status("user", user, "active")


@command(agents, "register", example="ibexctl agent register support-bot --org acme")
def register_agent(name: Name, org: OrgOption) -> Answer:
    """Register an agent in an organization: an automated caller, which can have a directive and a limit of its own.

    Callers name it in the header X-IBEX-Agent-ID, beside a token of the same organization.
    """

    async def act(operator: "Operator") -> dict[str, Any]:
        return await operator.identity.register_agent(await operator.directory.find_org(org), name)

    row = change(act)
    return Answer(row, notes=(f"Next: ibexctl token mint --org {row['org_id']} --agent {row['agent_id']}",))


@command(agents, "list", example="ibexctl agent list --org acme")
def list_agents(org: OrgFilter = None) -> Answer:
    """List agents, with their limits and the version of the directive in force for each."""
    columns = ("agent_id", "org_id", "name", "status", "rpm", "directive_version", "created_at")
    return listing("agents", columns, operate(within(org, lambda directory, org_id: directory.list_agents(org_id))))


@command(agents, "show", example=f"ibexctl agent show {_AN_AGENT}")
def show_agent(agent: Agent) -> Answer:
    """Show one agent: its organization, status, limit, and the version of its directive in force."""
    return Answer(operate(lambda operator: operator.directory.show_agent(AgentId(agent))))


@command(agents, "limit", example=f"ibexctl agent limit {_AN_AGENT} --rpm 60")
def limit_agent(agent: Agent, rpm: Rpm) -> Answer:
    """Limit the requests of an agent in any 60 s, within its organization's limit.

    What is over is answered 429 with Retry-After. In force within a second while Redis is up, else within 5 s.
    """

    async def act(operator: "Operator") -> dict[str, Any]:
        row = await operator.directory.show_agent(AgentId(agent))
        return await operator.identity.set_limit(row["org_id"], rpm, AgentId(agent))

    return Answer(change(act))


@command(agents, "pause", example=f"ibexctl agent pause {_AN_AGENT}")
def pause_agent(agent: Agent) -> Answer:
    """Refuse an agent's requests for a while, until `agent resume`.

    At once while Redis is up, within 5 s whatever happens to it; callers are answered 403 AGENT_SUSPENDED.
    """
    return _change_status("agent", agent, "paused")


@command(agents, "resume", example=f"ibexctl agent resume {_AN_AGENT}")
def resume_agent(agent: Agent) -> Answer:
    """Let a paused, suspended or archived agent call again, with the tokens, limit and directive it had."""
    return _change_status("agent", agent, "active")


@command(agents, "suspend", example=f"ibexctl agent suspend {_AN_AGENT}")
def suspend_agent(agent: Agent) -> Answer:
    """Refuse an agent's requests until somebody has looked at it."""
    return _change_status("agent", agent, "suspended")


@command(agents, "archive", example=f"ibexctl agent archive {_AN_AGENT}")
def archive_agent(agent: Agent) -> Answer:
    """Refuse an agent's requests for good; its record stays."""
    return _change_status("agent", agent, "archived")


def listing(key: str, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> Answer:
    """Rows as `--json` gives them under `key`, and as a table of these columns."""
    return Answer({key: rows}, (Table(columns, [[row[column] for column in columns] for row in rows]),))


def within(
    org: str | None, read: "Callable[[IdentityDirectory, OrgId | None], Awaitable[list[dict[str, Any]]]]"
) -> "Callable[[Operator], Awaitable[list[dict[str, Any]]]]":
    """An action that reads within one organization, named by id or name, or within all (None)."""

    async def act(operator: "Operator") -> list[dict[str, Any]]:
        directory = operator.directory
        return await read(directory, None if org is None else await directory.find_org(org))

    return act


def _with_default_limit(row: dict[str, Any], default: int) -> dict[str, Any]:
    """An organization with the limit that holds: its own, or the default as it is set here."""
    return row | {"rpm": row["rpm"] or default, "is_default_rpm": row["rpm"] is None}


def _shown_limit(row: dict[str, Any]) -> dict[str, Any]:
    """An organization as people read it: a default limit says that it is one."""
    shown = {name: value for name, value in row.items() if name != "is_default_rpm"}
    return shown | {"rpm": f"{row['rpm']} (default)"} if row["is_default_rpm"] else shown


def _change_org_status(org: str, status: str) -> Answer:
    async def act(operator: "Operator") -> dict[str, Any]:
        return await operator.identity.set_status("organization", await operator.directory.find_org(org), status)

    return Answer(change(act))


def _change_status(kind: Literal["user", "agent"], entity_id: UUID, status: str) -> Answer:
    return Answer(change(lambda operator: operator.identity.set_status(kind, entity_id, status)))
