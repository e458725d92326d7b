"""`ibexctl org`, `agent` and `token`: who may call, as whom, and how often."""

from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

from ibex.domain.identity import PERMISSION_SETS, AgentId, Permission
from ibexctl import arguments
from ibexctl.command import command, group
from ibexctl.operation import change
from ibexctl.output import Answer, Fields

if TYPE_CHECKING:
    from ibex.runtime import Operator

organizations = group("Organizations, and how often each may call.")
agents = group("Agents: the callers inside an organization.")
tokens = group("Tokens: what callers present.")

Org = Annotated[str, typer.Argument(metavar="ORG", help="An organization's id, or its name.")]
OrgOption = Annotated[str, typer.Option("--org", metavar="ORG", help="An organization's id, or its name.")]
AgentOption = Annotated[
    UUID | None, typer.Option("--agent", metavar="AGENT", parser=arguments.identifier, help="An agent's id.")
]


@command(organizations, "create", example="ibexctl org create acme")
def create_org(name: Annotated[str, typer.Argument(metavar="NAME", help="What it is called.")]) -> Answer:
    """Create an organization."""
    row = change(lambda operator: operator.identity.create_org(name))
    return Answer(row, notes=(f"Next: `ibexctl agent register NAME --org {row['org_id']}`",))


@command(organizations, "limit", example="ibexctl org limit acme --rpm 600")
def limit_org(
    org: Org,
    rpm: Annotated[int, typer.Option("--rpm", min=1, max=1_000_000, help="Requests in any 60 s.")],
    agent: AgentOption = None,
) -> Answer:
    """Set how many requests a minute an organization, or one agent of it, may send."""

    async def act(operator: "Operator") -> dict[str, Any]:
        org_id = await operator.identity.resolve_org(org)
        return await operator.identity.set_limit(org_id, rpm, None if agent is None else AgentId(agent))

    return Answer(change(act))


@command(agents, "register", example="ibexctl agent register support-bot --org acme")
def register_agent(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What it is called.")], org: OrgOption
) -> Answer:
    """Register an agent in an organization."""

    async def act(operator: "Operator") -> dict[str, Any]:
        return await operator.identity.register_agent(await operator.identity.resolve_org(org), name)

    row = change(act)
    return Answer(row, notes=(f"Next: `ibexctl token mint --org {row['org_id']} --agent {row['agent_id']}`",))


@command(tokens, "mint", example="ibexctl token mint --org acme --expires-in 30d")
def mint_token(
    org: OrgOption,
    agent: AgentOption = None,
    expires_in: Annotated[
        timedelta | None,
        typer.Option("--expires-in", metavar="SPAN", parser=arguments.duration, help="Such as 12h, 30d. Else: never."),
    ] = None,
    permissions: Annotated[
        Permission,
        typer.Option(
            "--permissions",
            metavar="SET",
            parser=arguments.permissions,
            help=f"One of {', '.join(PERMISSION_SETS)}, or permissions joined by +.",
        ),
    ] = arguments.DEFAULT_PERMISSIONS,  # type: ignore[assignment]
    name: Annotated[str, typer.Option("--name", help="What the token is for.")] = "",
) -> Answer:
    """Mint a token. It is shown once, now: ibex keeps only its digest."""

    async def act(operator: "Operator") -> tuple[dict[str, Any], str]:
        org_id = await operator.identity.resolve_org(org)
        return await operator.identity.mint_token(
            org_id,
            name=name,
            agent=None if agent is None else AgentId(agent),
            permissions=permissions,
            expires_in=expires_in,
        )

    row, bearer = change(act)
    shown = {key: value for key, value in row.items() if key != "permissions"}
    shown["permissions"] = arguments.set_name(permissions) or permissions
    return Answer(
        {**row, "token": bearer},
        (Fields(shown), "", f"export IBEX_TOKEN={bearer}"),
        ("The token is shown this once: keep it where secrets are kept.",),
    )


@command(tokens, "revoke", example="ibexctl token revoke ibex_pat_2f1c6a0e-6f0b-4a53-9a0e-0d7f3c1b2a4d")
def revoke_token(
    token: Annotated[
        str, typer.Argument(metavar="TOKEN", help="Its id, or its prefix ibex_pat_<id>; never the secret.")
    ],
) -> Answer:
    """Revoke a token: every server refuses it within a second. Doing it twice does no harm."""
    return Answer(change(lambda operator: operator.identity.revoke_token(token)))
