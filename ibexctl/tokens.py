"""`ibexctl token`: the bearer credentials that callers present."""

from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

from ibex.domain.delegation import Wish
from ibex.domain.identity import PERMISSION_SETS, AgentId, OrgId, Permission, TokenId, UserId, permission_names
from ibexctl import arguments
from ibexctl.command import command, group
from ibexctl.identity import AgentFilter, OrgFilter, listing
from ibexctl.operation import change, operate
from ibexctl.output import Answer, Fields, Table, View

if TYPE_CHECKING:
    from ibex.runtime import Operator

app = group("Tokens: what callers present.")

Token = Annotated[
    TokenId,
    typer.Argument(metavar="TOKEN", parser=arguments.token_identifier, help="Its id, or its prefix ibex_pat_<id>."),
]

_COLUMNS = (
    "prefix",
    "name",
    "org_id",
    "agent_id",
    "permissions",
    "created_at",
    "expires_at",
    "last_used_at",
    "revoked_at",
)
_REVOKED_COLUMNS = ("prefix", "name", "agent_id", "revoked_at")
_SHOWN_ONCE = "The token is shown this once: put it where secrets are kept."
_A_TOKEN = "ibex_pat_2f1c6a0e-6f0b-4a53-9a0e-0d7f3c1b2a4d"  # noqa: S105 - a prefix, for the examples


_MINT_EXAMPLE = """\
ibexctl token mint --org acme --expires-in 30d
ibexctl token mint --org acme --permissions Admin --name ci
ibexctl token mint --as-token /run/secrets/ibex-admin --expires-in 1h"""


@command(app, "mint", example=_MINT_EXAMPLE)
def mint(
    org: Annotated[
        str | None,
        typer.Option("--org", metavar="ORG", help="An organization's id, or its name; needed without --as-token."),
    ] = None,
    agent: Annotated[
        UUID | None,
        typer.Option("--agent", metavar="AGENT", parser=arguments.identifier, help="Bind it to this agent alone."),
    ] = None,
    user: Annotated[
        UUID | None,
        typer.Option(
            "--user", metavar="USER", parser=arguments.identifier, help="Whose it is. Else: the first user's."
        ),
    ] = None,
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
    ] = arguments.DEFAULT_PERMISSIONS,  # type: ignore[assignment]  # typer parses the default as it does a value
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="What the token is for.")] = "token",
    as_token: Annotated[
        str | None,
        typer.Option(
            "--as-token", metavar="FILE", help="Mint as the token in this file; - is standard input, asked for unseen."
        ),
    ] = None,
) -> Answer:
    """Mint a token. It is shown once, now: ibex keeps only its digest.

    The operator may give whatever there is. With --as-token the new token is no wider than the one that mints it, which
    must have the permission TOKEN_CREATE: some of its permissions, its organization and user, its agent if it is bound
    to one, and no longer a life. The audit event then names it.
    """
    if org is None and as_token is None:
        raise typer.BadParameter("Name the organization by --org, or mint --as-token.")
    minter = None if as_token is None else arguments.read_bearer(as_token)
    agent_id = None if agent is None else AgentId(agent)
    user_id = None if user is None else UserId(user)

    async def act(operator: "Operator") -> tuple[dict[str, Any], str]:
        if minter is not None:
            org_id = None if org is None else await operator.directory.find_org(org)
            wish = Wish(permissions, org_id, user_id, agent_id, expires_in)
            accepts_dev_token = operator.settings.is_development
            return await operator.identity.mint_token_by(minter, wish, name=name, accepts_dev_token=accepts_dev_token)
        return await operator.identity.mint_token(
            await operator.directory.find_org(str(org)),
            name=name,
            agent=agent_id,
            user=user_id,
            permissions=permissions,
            expires_in=expires_in,
        )

    row, bearer = change(act)
    return Answer({**_named(row), "token": bearer}, _new_token(row, bearer), (_SHOWN_ONCE,))


@command(app, "rotate", example=f"ibexctl token rotate {_A_TOKEN} --grace 24h")
def rotate(
    token: Token,
    grace: Annotated[
        timedelta,
        typer.Option("--grace", metavar="SPAN", parser=arguments.duration, help="How long the old token stays valid."),
    ] = "24h",  # type: ignore[assignment]  # typer parses the default as it does a value
    expires_in: Annotated[
        timedelta | None,
        typer.Option(
            "--expires-in",
            metavar="SPAN",
            parser=arguments.duration,
            help="Such as 12h, 30d. Else: as long as the old one was to live.",
        ),
    ] = None,
) -> Answer:
    """Mint a successor of a token; the old one stays valid for a while, so that callers can change over.

    The new one has the same name, owner, agent and permissions, and is shown once, now.
    """
    old, row, bearer = change(
        lambda operator: operator.identity.rotate_token(token, grace=grace, expires_in=expires_in)
    )
    data = {**_named(row), "token": bearer, "rotated": _named(old)}
    ending = Fields({"old token": old["prefix"], "valid until": old["expires_at"]})
    return Answer(data, (*_new_token(row, bearer), "", ending), (_SHOWN_ONCE,))


@command(app, "list", example="ibexctl token list --org acme --all")
def list_tokens(
    org: OrgFilter = None,
    agent: AgentFilter = None,
    is_all: Annotated[bool, typer.Option("--all", help="The revoked and the expired too.")] = False,
) -> Answer:
    """List tokens: those that are valid.

    Nobody can list their secrets. When one was last used is known to the minute or so.
    """

    async def act(operator: "Operator") -> list[dict[str, Any]]:
        org_id = None if org is None else await operator.directory.find_org(org)
        agent_id = None if agent is None else AgentId(agent)
        return await operator.directory.list_tokens(org_id, agent_id, is_all=is_all)

    rows = [_named(row) for row in operate(act)]
    table = [[_permissions(row) if name == "permissions" else row[name] for name in _COLUMNS] for row in rows]
    empty = "No token." if is_all else "No valid token; --all shows the revoked and the expired too."
    return Answer({"tokens": rows}, (Table(_COLUMNS, table, empty=empty),))


_REVOKE_EXAMPLE = f"""\
ibexctl token revoke {_A_TOKEN}
ibexctl token revoke --org acme
ibexctl token revoke --minted-by {_A_TOKEN}"""


@command(app, "revoke", example=_REVOKE_EXAMPLE)
def revoke(
    token: Annotated[
        TokenId | None,
        typer.Argument(metavar="TOKEN", parser=arguments.token_identifier, help="Its id, or its prefix ibex_pat_<id>."),
    ] = None,
    org: Annotated[str | None, typer.Option("--org", metavar="ORG", help="All tokens of this organization.")] = None,
    agent: Annotated[
        UUID | None,
        typer.Option("--agent", metavar="AGENT", parser=arguments.identifier, help="All tokens bound to this agent."),
    ] = None,
    minted_by: Annotated[
        TokenId | None,
        typer.Option(
            "--minted-by",
            metavar="TOKEN",
            parser=arguments.token_identifier,
            help="All that this token minted, what those minted in turn, and their successors.",
        ),
    ] = None,
) -> Answer:
    """Revoke a token, or many: every server refuses it at once. Doing it twice does no harm.

    At once means within a quarter of a second while Redis is up, and within 5 s whatever happens to it. A revoked
    token cannot be brought back; its row stays, for the record. After a leak revoke the token first, then what it
    minted: --minted-by does not revoke the minter.
    """
    if sum((token is not None, minted_by is not None, org is not None or agent is not None)) > 1:
        raise typer.BadParameter("Name one token, or all by --org and --agent, or all by --minted-by.")
    if minted_by is not None:
        return _revoke_minted_by(minted_by)
    if token is not None:
        return Answer(_named(change(lambda operator: operator.identity.revoke_token(token))))
    if org is None and agent is None:
        raise typer.BadParameter("Name a token, or all by --org, --agent or --minted-by.")

    async def act(operator: "Operator") -> list[dict[str, Any]]:
        agent_id = None if agent is None else AgentId(agent)
        if agent_id is None or org is not None:
            org_id = await operator.directory.find_org(str(org))
        else:
            org_id = OrgId((await operator.directory.show_agent(agent_id))["org_id"])
        return await operator.identity.revoke_tokens(org_id, agent=agent_id)

    return listing("tokens", _REVOKED_COLUMNS, [_named(row) for row in change(act)])


def _revoke_minted_by(token: TokenId) -> Answer:
    revoked, minter = change(lambda operator: operator.identity.revoke_minted_by(token))
    rows = [_named(row) for row in revoked]
    table = Table(_REVOKED_COLUMNS, [[row[name] for name in _REVOKED_COLUMNS] for row in rows], empty="No token.")
    notes = [f"{len(rows)} revoked that {minter['prefix']} had minted."]
    if minter["revoked_at"] is None:
        notes.append(f"That token itself is not revoked: ibexctl token revoke {minter['prefix']}")
    return Answer({"minted_by": token, "tokens": rows}, (table,), tuple(notes))


def _new_token(row: dict[str, Any], bearer: str) -> tuple[View, ...]:
    shown = {name: row[name] for name in ("token_id", "org_id", "user_id", "agent_id", "name", "expires_at")}
    return Fields({**shown, "permissions": _permissions(row)}), "", f"export IBEX_TOKEN={bearer}"


def _permissions(row: dict[str, Any]) -> object:
    """A set's name where there is one, else the bits' names."""
    return arguments.set_name(row["permissions"]) or permission_names(row["permissions"])


def _named(row: dict[str, Any]) -> dict[str, Any]:
    """A token's row with its permissions by name beside the bitmap."""
    return {**row, "permission_names": permission_names(row["permissions"])}
