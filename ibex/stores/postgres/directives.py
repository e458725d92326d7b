"""Directives at rest: the version in force for the proxy, and the operators' new versions and roll-backs."""

from uuid import UUID

from ibex.domain.directives import Directive, DirectiveMode, check_directive_text
from ibex.domain.identity import AgentId, OrgId
from ibex.errors import OperatorError, UnknownEntity
from ibex.stores.postgres.audit import AuditedStore, Row, plain
from ibex.stores.postgres.pool import Connection, Postgres

_IN_FORCE = """
select v.version, v.mode, v.text
from ibex_core.directives as d
join ibex_core.directive_versions as v on v.agent_id = d.agent_id and v.version = d.version
where d.org_id = $1 and d.agent_id = $2
"""

_VERSIONS = """
select v.agent_id, v.version, v.org_id, v.mode, v.sha256, v.created_at, d.version is not null as is_in_force
from ibex_core.directive_versions as v
left join ibex_core.directives as d on d.agent_id = v.agent_id and d.version = v.version
where v.agent_id = $1 order by v.version
"""

_VERSION = """
select v.agent_id, v.version, v.org_id, v.mode, v.sha256, v.created_at, d.version is not null as is_in_force, v.text
from ibex_core.directive_versions as v
left join ibex_core.directives as d on d.agent_id = v.agent_id and d.version = v.version
where v.agent_id = $1 and ($2::integer is null and d.version is not null or v.version = $2)
"""

_POINT = """
insert into ibex_core.directives (agent_id, org_id, version) values ($1, $2, $3)
on conflict (agent_id) do update set version = excluded.version, updated_at = clock_timestamp()
"""


class DirectiveReader:
    """Reads the directive in force, in the application's role and under row security."""

    def __init__(self, postgres: Postgres) -> None:
        self._postgres = postgres

    async def in_force(self, org_id: OrgId, agent_id: AgentId, *, timeout: float = 5) -> Directive | None:
        """The agent's directive; None when it has none."""
        async with self._postgres.transaction(
            org_ids=(org_id,), timeout=timeout, operation="directive_in_force"
        ) as connection:
            row = await connection.fetchrow(_IN_FORCE, org_id, agent_id)
        return Directive(row["version"], DirectiveMode(row["mode"]), row["text"]) if row else None


class DirectiveAdmin(AuditedStore):
    """Writes directives, as the owner. Versions are immutable: a change is a new one, a roll-back moves the pointer."""

    async def set(self, agent_id: AgentId, text: str, mode: DirectiveMode = DirectiveMode.SYSTEM_FIRST) -> int:
        """Write a new version and put it in force; its number."""
        fault = check_directive_text(text)
        if fault is not None:
            raise OperatorError(fault)
        async with self._changing() as connection:
            org_id = await _lock_agent(connection, agent_id)
            version = int(
                await connection.fetchval(
                    "select coalesce(max(version), 0) + 1 from ibex_core.directive_versions where agent_id = $1",
                    agent_id,
                )
            )
            digest = Directive(version, mode, text).sha256
            await connection.execute(
                "insert into ibex_core.directive_versions (agent_id, version, org_id, mode, text, sha256)"
                " values ($1, $2, $3, $4, $5, $6)",
                *(agent_id, version, org_id, mode.value, text, digest),
            )
            await connection.execute(_POINT, agent_id, org_id, version)
            details = {"version": version, "mode": mode.value, "sha256": digest.hex()}
            await self._audit(connection, "set", "directive", agent_id, org_id, **details)
        return version

    async def roll_back(self, agent_id: AgentId, version: int) -> int:
        """Put an older version in force again; its number."""
        async with self._changing() as connection:
            org_id = await _lock_agent(connection, agent_id)
            found = await connection.fetchval(
                "select 1 from ibex_core.directive_versions where agent_id = $1 and version = $2", agent_id, version
            )
            if found is None:
                raise UnknownEntity(f"Agent {agent_id} has no directive version {version}.")
            await connection.execute(_POINT, agent_id, org_id, version)
            await self._audit(connection, "roll_back", "directive", agent_id, org_id, version=version)
        return version

    async def clear(self, agent_id: AgentId) -> None:
        """Let the agent have no directive; its versions stay."""
        async with self._changing() as connection:
            org_id = await _lock_agent(connection, agent_id)
            await connection.execute("delete from ibex_core.directives where agent_id = $1", agent_id)
            await self._audit(connection, "clear", "directive", agent_id, org_id)

    async def read(self, agent_id: AgentId, version: int | None = None) -> Row:
        """One version with its text: the one in force, unless another is asked for. Raises UnknownEntity."""
        async with self._postgres.transaction(operation="operator") as connection:
            await _lock_agent(connection, agent_id)
            row = await connection.fetchrow(_VERSION, agent_id, version)
        if row is None:
            what = "directive in force" if version is None else f"directive version {version}"
            raise UnknownEntity(
                f"Agent {agent_id} has no {what}.", hint="`ibexctl directive history` shows its versions."
            )
        return plain(row)

    async def list_versions(self, agent_id: AgentId) -> list[Row]:
        """Every version, oldest first, with `is_in_force`; without the text."""
        async with self._postgres.transaction(operation="operator") as connection:
            await _lock_agent(connection, agent_id)
            rows = await connection.fetch(_VERSIONS, agent_id)
        return [plain(row) for row in rows]


async def _lock_agent(connection: Connection, agent_id: AgentId) -> UUID:
    """The agent's organization; whoever else writes its directive waits, so that version numbers have no gaps."""
    org_id: UUID | None = await connection.fetchval(
        "select org_id from ibex_core.agents where agent_id = $1 for no key update", agent_id
    )
    if org_id is None:
        raise UnknownEntity(f"There is no agent {agent_id}.", hint="`ibexctl agent register NAME` makes one.")
    return org_id
