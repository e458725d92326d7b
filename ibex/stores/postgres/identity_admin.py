"""What operators do with organizations, agents, tokens and limits."""

from datetime import timedelta
from typing import Literal
from uuid import UUID, uuid4

from ibex.domain.delegation import Wish, check_delegation
from ibex.domain.identity import (
    PROXY_CHAT,
    AgentId,
    OrgId,
    Permission,
    TokenId,
    UserId,
    mint_token,
    parse_bearer,
    parse_uuid,
)
from ibex.errors import OperatorError, UnknownEntity
from ibex.stores.postgres.audit import AuditedStore, Row, plain, write
from ibex.stores.postgres.identity_statements import (
    LOCK_PREDECESSOR,
    MINT,
    REVOKE_MANY,
    REVOKE_MINTED,
    REVOKE_ONE,
    SET_STATUS,
    SHORTEN,
)
from ibex.stores.postgres.minters import find_minter
from ibex.stores.postgres.pool import Connection

StatusKind = Literal["organization", "user", "agent"]

_PREFIX = "ibex_pat_"
_LIST_HINT = "`ibexctl token list --all` shows those there are."

_STATUSES: dict[StatusKind, tuple[str, ...]] = {
    "organization": ("active", "suspended"),
    "user": ("active", "suspended"),
    "agent": ("active", "paused", "suspended", "archived"),
}


class IdentityAdmin(AuditedStore):
    """Creates and changes who there is, as the owner; each change leaves an audit event in its own transaction."""

    async def create_org(self, name: str) -> Row:
        """Create an organization with a first user, to whom its tokens will belong: org_id, name, status, user_id."""
        org_id, user_id = OrgId(uuid4()), UserId(uuid4())
        _check_name(name)
        async with self._changing() as connection:
            row = await write(
                connection,
                "insert into ibex_core.organizations (org_id, name) values ($1, $2) returning *",
                org_id,
                name,
            )
            await connection.execute(
                "insert into ibex_core.users (user_id, org_id, name) values ($1, $2, 'Owner')", user_id, org_id
            )
            await self._audit(connection, "create", "organization", org_id, org_id, user_id=user_id)
        return row | {"user_id": user_id}

    async def create_user(self, org: OrgId, name: str) -> Row:
        """Create a user in an organization: user_id, org_id, name, status."""
        user_id = UserId(uuid4())
        _check_name(name)
        async with self._changing() as connection:
            await _check_org(connection, org)
            row = await write(
                connection,
                "insert into ibex_core.users (user_id, org_id, name) values ($1, $2, $3) returning *",
                *(user_id, org, name),
            )
            await self._audit(connection, "create", "user", user_id, org)
        return row

    async def register_agent(self, org: OrgId, name: str) -> Row:
        """Register an agent in an organization: agent_id, org_id, name, status."""
        agent_id = AgentId(uuid4())
        _check_name(name)
        async with self._changing() as connection:
            await _check_org(connection, org)
            row = await write(
                connection,
                "insert into ibex_core.agents (agent_id, org_id, name) values ($1, $2, $3) returning *",
                *(agent_id, org, name),
            )
            await self._audit(connection, "register", "agent", agent_id, org)
        return row

    async def set_limit(self, org: OrgId, rpm: int | None, agent: AgentId | None = None) -> Row:
        """Set the requests a minute of an organization, or of one agent of it; None removes the limit."""
        if rpm is not None and not 1 <= rpm <= 1_000_000:
            raise OperatorError("A limit is 1 to 1,000,000 requests a minute.")
        async with self._changing() as connection:
            await _check_org(connection, org)
            if agent is not None:
                await _check_agent(connection, org, agent)
            if rpm is None:
                await connection.execute(
                    "delete from ibex_core.limits where org_id = $1 and agent_id is not distinct from $2", org, agent
                )
            else:
                await connection.execute(
                    "insert into ibex_core.limits (limit_id, org_id, agent_id, rpm) values ($1, $2, $3, $4)"
                    " on conflict (org_id, agent_id) do update set rpm = excluded.rpm, updated_at = clock_timestamp()",
                    *(uuid4(), org, agent, rpm),
                )
            await self._audit(connection, "set_limit", "limit", agent or org, org, rpm=rpm)
        return {"org_id": org, "agent_id": agent, "rpm": rpm}

    async def set_status(self, kind: StatusKind, entity_id: UUID, status: str) -> Row:
        """Suspend, pause, archive or resume (`active`) an organization, a user or an agent."""
        if status not in _STATUSES[kind]:
            raise OperatorError(f"The status of this is one of {', '.join(_STATUSES[kind])}.")
        async with self._changing() as connection:
            if kind == "organization":
                await _check_org(connection, OrgId(entity_id))
            row = await connection.fetchrow(SET_STATUS[kind], entity_id, status)
            if row is None:
                raise UnknownEntity(f"There is no {kind} {entity_id}.", hint="Check the id.")
            await self._audit(connection, "set_status", kind, entity_id, row["org_id"], status=status)
        return plain(row)

    async def mint_token(
        self,
        org: OrgId,
        *,
        name: str = "",
        agent: AgentId | None = None,
        user: UserId | None = None,
        permissions: Permission = PROXY_CHAT,
        expires_in: timedelta | None = None,
    ) -> tuple[Row, str]:
        """Mint a token and answer its row and its bearer, which is nowhere kept.

        `agent` binds it to that agent; without `user` it belongs to the organization's first user. It expires by the
        database's clock.
        """
        name = name or "token"
        _check_name(name)
        _check_lifetime(expires_in)
        token = mint_token()
        async with self._changing() as connection:
            await _check_org(connection, org)
            if agent is not None:
                await _check_agent(connection, org, agent)
            user_id = await _find_user(connection, org, user)
            row = await write(
                *(connection, MINT, token.token_id, org, user_id, agent, name, f"{_PREFIX}{token.token_id}"),
                *(token.digest, int(permissions), expires_in, None),
            )
            await self._audit_minting(connection, row)
        return row, token.bearer

    async def mint_token_by(
        self, bearer: str, wish: Wish, *, name: str = "", accepts_dev_token: bool = False
    ) -> tuple[Row, str]:
        """Mint a token as another one, which is no wider than that: its row and its bearer.

        Raises OperatorError when the bearer is no valid token, or may not pass on what is wished; the audit event names
        it. What is not wished is as the minter's; so is the last moment at which the new token can expire.
        """
        name = name or "token"
        _check_name(name)
        _check_lifetime(wish.expires_in)
        token = mint_token()
        async with self._changing() as connection:
            minter, last_moment = await find_minter(connection, bearer, accepts_dev_token=accepts_dev_token)
            check_delegation(minter, wish)
            agent_id = wish.agent_id or minter.agent_id
            if agent_id is not None:
                await _check_agent(connection, minter.org_id, agent_id)
            row = await write(
                *(connection, MINT, token.token_id, minter.org_id, minter.user_id, agent_id),
                *(name, f"{_PREFIX}{token.token_id}", token.digest, int(wish.permissions)),
                *(wish.expires_in, last_moment),
            )
            actor, about = f"{_PREFIX}{minter.token_id}", ("mint", "token", row["token_id"], row["org_id"])
            await self._note(connection, actor, *about, _describe(row))
        return row, token.bearer

    async def rotate_token(
        self, token: TokenId | str, *, grace: timedelta, expires_in: timedelta | None = None
    ) -> tuple[Row, Row, str]:
        """Mint a successor with the same name, owner, agent and permissions; the old token expires `grace` from now,
        unless it would sooner. Answers the old row, the new one, and the new bearer.

        The successor lives as long as the old token was to live when it was minted, unless `expires_in` says otherwise.
        """
        _check_lifetime(expires_in)
        token_id, successor = _parse_token_id(token), mint_token()
        async with self._changing() as connection:
            old = await connection.fetchrow(LOCK_PREDECESSOR, token_id)
            if old is None:
                raise UnknownEntity(f"There is no token {token_id}.", hint=_LIST_HINT)
            if not old["is_valid"]:
                raise OperatorError(
                    f"Token {token_id} is revoked or expired: there is nothing to rotate.",
                    hint="`ibexctl token mint` makes a new one.",
                )
            row = await write(
                *(connection, MINT, successor.token_id, old["org_id"], old["user_id"], old["agent_id"]),
                *(old["name"], f"{_PREFIX}{successor.token_id}", successor.digest, old["permissions"]),
                *(old["lifetime"] if expires_in is None else expires_in, None),
            )
            ending = await write(connection, SHORTEN, token_id, grace)
            await self._audit_minting(connection, row, rotated_from=token_id)
            details = {"successor": successor.token_id, "expires_at": ending["expires_at"]}
            await self._audit(connection, "rotate", "token", token_id, old["org_id"], **details)
        return ending, row, successor.bearer

    async def revoke_token(self, token: TokenId | str) -> Row:
        """Revoke a token by its id or prefix; one already revoked stays revoked since then."""
        token_id = _parse_token_id(token)
        async with self._changing() as connection:
            await self._revoke(connection, REVOKE_ONE, token_id)
            row = await connection.fetchrow("select * from ibex_core.tokens where token_id = $1", token_id)
            if row is None:
                raise UnknownEntity(f"There is no token {token_id}.", hint=_LIST_HINT)
        return plain(row)

    async def revoke_tokens(self, org: OrgId, *, agent: AgentId | None = None) -> list[Row]:
        """Revoke every token of an organization, or those bound to one agent; the rows that were not yet revoked."""
        async with self._changing() as connection:
            await _check_org(connection, org)
            if agent is not None:
                await _check_agent(connection, org, agent)
            return await self._revoke(connection, REVOKE_MANY, org, agent)

    async def revoke_minted_by(self, token: TokenId | str) -> tuple[list[Row], Row]:
        """Revoke what a token minted, and what that minted in its turn: the rows that were not yet revoked, and the
        minter, which stays as it is.
        """
        token_id = _parse_token_id(token)
        async with self._changing() as connection:
            minter = await connection.fetchrow("select * from ibex_core.tokens where token_id = $1", token_id)
            if minter is None:
                raise UnknownEntity(f"There is no token {token_id}.", hint=_LIST_HINT)
            values, revoked = (minter["org_id"], token_id), list[Row]()
            # Again, until there is none: one of them may have been minting while its row was waited for.
            while rows := await self._revoke(connection, REVOKE_MINTED, *values, minted_by=token_id):
                revoked += rows
        return revoked, plain(minter)

    async def list_org_ids(self) -> list[OrgId]:
        """Every organization there is."""
        async with self._postgres.transaction(operation="list_org_ids") as connection:
            return [
                OrgId(row["org_id"]) for row in await connection.fetch("select org_id from ibex_core.organizations")
            ]

    async def _audit_minting(self, connection: Connection, row: Row, **details: object) -> None:
        await self._audit(connection, "mint", "token", row["token_id"], row["org_id"], **_describe(row), **details)

    async def _revoke(
        self, connection: Connection, statement: str, *values: UUID | None, **details: object
    ) -> list[Row]:
        rows = await connection.fetch(statement, *values)
        for row in rows:
            await self._audit(connection, "revoke", "token", row["token_id"], row["org_id"], **details)
        return [plain(row) for row in rows]


def _describe(token: Row) -> Row:
    """What an audit event says of a token that was minted."""
    return {name: token[name] for name in ("user_id", "agent_id", "permissions", "expires_at")}


def _check_name(name: str) -> None:
    if not 1 <= len(name) <= 200 or not name.isprintable():
        raise OperatorError("A name is 1 to 200 printable characters.")


def _check_lifetime(expires_in: timedelta | None) -> None:
    if expires_in is not None and expires_in <= timedelta():
        raise OperatorError("A token must expire in the future.")


async def _check_org(connection: Connection, org: OrgId) -> None:
    query = "select status from ibex_core.organizations where org_id = $1 for key share"
    status = await connection.fetchval(query, org)
    if status is None:
        raise UnknownEntity(f"There is no organization {org}.", hint="`ibexctl org create NAME` creates one.")
    if status == "erasing":
        raise OperatorError(f"Organization {org} is being erased.", hint="`ibexctl org erase` goes on with it.")


async def _check_agent(connection: Connection, org: OrgId, agent: AgentId) -> None:
    found = await connection.fetchval(
        "select 1 from ibex_core.agents where org_id = $1 and agent_id = $2 for key share", org, agent
    )
    if found is None:
        raise UnknownEntity(
            f"There is no agent {agent} in organization {org}.", hint="`ibexctl agent register NAME` makes one."
        )


async def _find_user(connection: Connection, org: OrgId, user: UserId | None) -> UserId:
    found = await connection.fetchval(
        "select user_id from ibex_core.users where org_id = $1 and ($2::uuid is null or user_id = $2)"
        " order by created_at, user_id limit 1",
        *(org, user),
    )
    if found is None:
        raise UnknownEntity(f"There is no user {user or ''} in organization {org}.", hint="Check the id.")
    return UserId(found)


def _parse_token_id(token: TokenId | str) -> UUID:
    """Accepts an id, a prefix or a whole bearer, which is never shown again."""
    if isinstance(token, UUID):
        return token
    found = parse_bearer(token) or parse_uuid(token.removeprefix(_PREFIX))
    if found is None:
        raise UnknownEntity("This names no token.", hint=f"Give its id, or its prefix ({_PREFIX}<uuid>).")
    return found
