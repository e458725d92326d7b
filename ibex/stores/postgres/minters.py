"""Tokens that mint: a presented bearer verified against its row, which nobody changes meanwhile."""

from datetime import datetime

from ibex.domain.delegation import Minter
from ibex.domain.identity import (
    DEV_TOKEN_ID,
    AgentId,
    OrgId,
    Permission,
    TokenId,
    UserId,
    digest_bearer,
    parse_bearer,
    verify_digest,
)
from ibex.errors import OperatorError
from ibex.stores.postgres.identity_statements import LOCK_MINTER
from ibex.stores.postgres.pool import Connection


async def find_minter(
    connection: Connection, bearer: str, *, accepts_dev_token: bool
) -> tuple[Minter, datetime | None]:
    """Who presents this bearer, and when that token expires; its row is locked until the transaction ends.

    Raises OperatorError, the same one whatever is wrong: malformed, unknown, another secret, expired, revoked, or an
    organization, user or agent that is suspended.
    """
    token_id = parse_bearer(bearer)
    is_refused = token_id is None or (token_id == DEV_TOKEN_ID and not accepts_dev_token)
    row = None if is_refused else await connection.fetchrow(LOCK_MINTER, token_id)
    if row is None or not verify_digest(digest_bearer(bearer), row["digest"]) or not row["is_valid"]:
        raise OperatorError(
            "The token that is to mint is not valid.",
            hint="It may be mistyped, expired, revoked, or its organization, user or agent suspended.",
        )
    minter = Minter(
        TokenId(row["token_id"]),
        OrgId(row["org_id"]),
        UserId(row["user_id"]),
        None if row["agent_id"] is None else AgentId(row["agent_id"]),
        Permission(row["permissions"]),
        row["expires_in"],
    )
    return minter, row["expires_at"]
