"""Who a token belongs to and what it may do, as the proxy reads it; IdentityAdmin is the operators' side."""

from collections.abc import Sequence
from uuid import UUID

import asyncpg

from ibex.domain.identity import DEV_TOKEN_ID, AgentId, Credential, OrgId, Permission, TokenId, UserId
from ibex.stores.postgres.identity_admin import IdentityAdmin
from ibex.stores.postgres.pool import Postgres

__all__ = ["IdentityAdmin", "IdentityReader"]

_NOBODY = OrgId(UUID(int=0))

_OWNER = """
select org_id, set_config('ibex.org_ids', org_id::text, true) from ibex_core.tokens where token_id = $1
"""

_CREDENTIALS = """
select t.token_id, t.org_id, t.user_id, t.digest, t.permissions, t.agent_id as bound_agent_id,
       t.revoked_at is not null as is_revoked,
       extract(epoch from t.expires_at - clock_timestamp())::float8 as expires_in,
       o.status as org_status, u.status as user_status, k.agent_id, a.status as agent_status,
       org_limit.rpm as org_rpm, agent_limit.rpm as agent_rpm
from unnest($1::uuid[], $2::uuid[], $3::uuid[]) as k (org_id, token_id, agent_id)
join ibex_core.tokens as t on t.org_id = k.org_id and t.token_id = k.token_id
join ibex_core.organizations as o on o.org_id = t.org_id
join ibex_core.users as u on u.org_id = t.org_id and u.user_id = t.user_id
left join ibex_core.agents as a on a.org_id = t.org_id and a.agent_id = k.agent_id
left join ibex_core.limits as org_limit on org_limit.org_id = t.org_id and org_limit.agent_id is null
left join ibex_core.limits as agent_limit on agent_limit.org_id = a.org_id and agent_limit.agent_id = a.agent_id
"""

_MARK_USED = """
update ibex_core.tokens as t set last_used_at = clock_timestamp()
from (
    select token_id from ibex_core.tokens
    where token_id = any ($1::uuid[])
      and (last_used_at is null or last_used_at < clock_timestamp() - interval '1 minute')
    for no key update skip locked
) as due
where t.token_id = due.token_id
"""
"""Skips a token that somebody else is marking, or an operator changing: no process waits for another, in no order."""


class IdentityReader:
    """Looks credentials up, in the application's role and under row security."""

    def __init__(self, postgres: Postgres) -> None:
        self._postgres = postgres

    async def find_credential(self, token_id: TokenId, agent_id: AgentId, *, timeout: float = 5) -> Credential | None:
        """The presented token with the agent it was presented for; None when there is no such token.

        An unknown token takes the same two questions as a known one, so that time does not tell them apart.
        """
        async with self._postgres.transaction(
            token_id=token_id, timeout=timeout, operation="find_credential"
        ) as connection:
            owner = await connection.fetchrow(_OWNER, token_id)
            org_id = owner["org_id"] if owner else _NOBODY
            row = await connection.fetchrow(_CREDENTIALS, [org_id], [token_id], [agent_id])
        return _credential(row) if row else None

    async def find_credentials(
        self, keys: Sequence[tuple[OrgId, TokenId, AgentId]], *, timeout: float = 5
    ) -> dict[tuple[TokenId, AgentId], Credential]:
        """Read many known credentials again in one question; a key that is absent from the answer is gone."""
        if not keys:
            return {}
        org_ids, token_ids, agent_ids = zip(*keys, strict=True)
        async with self._postgres.transaction(
            org_ids=set(org_ids), timeout=timeout, operation="find_credentials"
        ) as connection:
            rows = await connection.fetch(_CREDENTIALS, org_ids, token_ids, agent_ids)
        credentials = map(_credential, rows)
        return {(credential.token_id, credential.agent_id): credential for credential in credentials}

    async def mark_used(self, keys: Sequence[tuple[OrgId, TokenId]]) -> None:
        """Note that these tokens were used just now, to the minute."""
        if not keys:
            return
        async with self._postgres.transaction(
            org_ids={org_id for org_id, _ in keys}, operation="mark_used"
        ) as connection:
            await connection.execute(_MARK_USED, [token_id for _, token_id in keys])

    async def has_development_token(self) -> bool:
        """Whether the development token's row exists, revoked or not."""
        async with self._postgres.transaction(token_id=DEV_TOKEN_ID, operation="has_development_token") as connection:
            return bool(
                await connection.fetchval(
                    "select exists (select from ibex_core.tokens where token_id = $1)", DEV_TOKEN_ID
                )
            )


def _credential(row: asyncpg.Record) -> Credential:
    bound_agent_id: UUID | None = row["bound_agent_id"]
    return Credential(
        token_id=TokenId(row["token_id"]),
        org_id=OrgId(row["org_id"]),
        user_id=UserId(row["user_id"]),
        digest=row["digest"],
        permissions=Permission(row["permissions"]),
        bound_agent_id=None if bound_agent_id is None else AgentId(bound_agent_id),
        is_revoked=row["is_revoked"],
        expires_in=row["expires_in"],
        org_status=row["org_status"],
        user_status=row["user_status"],
        agent_id=AgentId(row["agent_id"]),
        agent_status=row["agent_status"],
        org_rpm=row["org_rpm"],
        agent_rpm=row["agent_rpm"],
    )
