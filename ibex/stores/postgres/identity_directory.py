"""Who there is, as an operator looks it up: organizations, users, agents, tokens, and who changed what."""

import json
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from ibex.domain.identity import AgentId, OrgId, parse_uuid
from ibex.errors import OperatorError, UnknownEntity
from ibex.stores.postgres.audit import Row, plain
from ibex.stores.postgres.pool import Postgres

_ORGS = """
select o.org_id, o.name, o.status, l.rpm, o.created_at,
       (select count(*) from ibex_core.agents as a where a.org_id = o.org_id) as agent_count,
       (select count(*) from ibex_core.tokens as t where t.org_id = o.org_id and t.revoked_at is null) as token_count
from ibex_core.organizations as o
left join ibex_core.limits as l on l.org_id = o.org_id and l.agent_id is null
where $1::uuid is null or o.org_id = $1 order by o.created_at, o.org_id
"""

_USERS = """
select user_id, org_id, name, status, created_at from ibex_core.users
where $1::uuid is null or org_id = $1 order by created_at, user_id
"""

_AGENTS = """
select a.agent_id, a.org_id, a.name, a.status, l.rpm, d.version as directive_version, a.created_at
from ibex_core.agents as a
left join ibex_core.limits as l on l.org_id = a.org_id and l.agent_id = a.agent_id
left join ibex_core.directives as d on d.agent_id = a.agent_id
where ($1::uuid is null or a.org_id = $1) and ($2::uuid is null or a.agent_id = $2) order by a.created_at, a.agent_id
"""

_TOKENS = """
select token_id, org_id, user_id, agent_id, name, prefix, permissions, created_at, expires_at, last_used_at, revoked_at
from ibex_core.tokens
where ($1::uuid is null or org_id = $1) and ($2::uuid is null or agent_id = $2)
  and ($3 or (revoked_at is null and coalesce(expires_at > clock_timestamp(), true)))
order by created_at, token_id
"""

_AUDIT = """
select created_at, org_id, actor, action, entity_kind, entity_id, details::text from ibex_core.audit_events
where ($1::uuid is null or org_id = $1) and ($2::text is null or entity_kind = $2)
order by created_at desc, audit_event_id limit $3
"""


class IdentityDirectory:
    """Reads, as the owner, what `IdentityAdmin` changes; rows carry the contract's column names, digests never."""

    def __init__(self, postgres: Postgres) -> None:
        self._postgres = postgres

    async def find_org(self, text: str) -> OrgId:
        """The organization with this id, or else with this name. Raises UnknownEntity, or OperatorError when several
        have the name.
        """
        org_id = parse_uuid(text)
        found = await self._fetch(
            "select org_id from ibex_core.organizations where ($1::uuid is not null and org_id = $1)"
            " or ($1::uuid is null and name = $2) limit 2",
            *(org_id, text),
        )
        if not found:
            raise UnknownEntity(f"There is no organization {text}.", hint="`ibexctl org list` shows those there are.")
        if len(found) > 1:
            raise OperatorError(
                f"Several organizations are called {text}.", hint="Give its id: `ibexctl org list` shows them."
            )
        return OrgId(found[0]["org_id"])

    async def list_orgs(self) -> list[Row]:
        """Every organization, oldest first, with its limit (None: the default) and how much belongs to it."""
        return await self._fetch(_ORGS, None)

    async def show_org(self, org_id: OrgId) -> Row:
        """One organization, as `list_orgs` shows it."""
        return _only(await self._fetch(_ORGS, org_id), f"There is no organization {org_id}.")

    async def list_users(self, org_id: OrgId | None = None) -> list[Row]:
        """Users, oldest first; of one organization, or all."""
        return await self._fetch(_USERS, org_id)

    async def list_agents(self, org_id: OrgId | None = None) -> list[Row]:
        """Agents, oldest first, with their limit and their directive's version, if any."""
        return await self._fetch(_AGENTS, org_id, None)

    async def show_agent(self, agent_id: AgentId) -> Row:
        """One agent, as `list_agents` shows it."""
        return _only(await self._fetch(_AGENTS, None, agent_id), f"There is no agent {agent_id}.")

    async def list_tokens(
        self, org_id: OrgId | None = None, agent_id: AgentId | None = None, *, is_all: bool = False
    ) -> list[Row]:
        """Tokens, oldest first: those that are valid, or with `is_all` the revoked and expired too."""
        return await self._fetch(_TOKENS, org_id, agent_id, is_all)

    async def list_audit_events(
        self, org_id: OrgId | None = None, limit: int = 50, *, kind: str | None = None
    ) -> list[Row]:
        """What operators changed, newest first; of one organization, or of one kind of entity."""
        rows = await self._fetch(_AUDIT, org_id, kind, limit)
        return [row | {"details": json.loads(row["details"])} for row in rows]

    async def _fetch(self, statement: str, *values: UUID | str | int | None) -> list[Row]:
        async with self._postgres.transaction(timeout=15, operation="operator") as connection:
            return [plain(row) for row in await connection.fetch(statement, *values)]


def _only(rows: Sequence[dict[str, Any]], message: str) -> Row:
    if not rows:
        raise UnknownEntity(message, hint="Check the id.")
    return rows[0]
