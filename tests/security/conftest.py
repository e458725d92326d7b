"""The whole chain of one worker, and everybody who may or may not pass it."""

import asyncio
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest

from ibex.domain.identity import PERMISSION_SETS, AgentId, Permission, mint_token
from ibex.stores.redis.subscription import publish_changes
from tests.conftest import PostgresDatabase
from tests.relays import Relay
from tests.security.canaries import log_lines, spans
from tests.security.nodes import nodes, running_nodes
from tests.server.conftest import Edge, edge
from tests.stores.conftest import admin, app, directives, owner, tenant, tenants
from tests.tenants import Tenant, make_tenant

__all__ = [
    "admin",
    "app",
    "directives",
    "edge",
    "log_lines",
    "nodes",
    "owner",
    "running_nodes",
    "spans",
    "tenant",
    "tenants",
]


@dataclass(frozen=True, slots=True)
class CuttableDatabase(PostgresDatabase):
    """A database that the worker, though not its operators, reaches through a relay."""

    relay: Relay = field(kw_only=True)


@dataclass
class Cast:
    """Who comes to the door."""

    edge: Edge
    redis_url: str
    relay: Relay
    other: Tenant
    suspended_org: Tenant
    suspended_user: Tenant
    unknown: str
    revoked: str
    expired: str
    powerless: str
    read_only: str
    almighty: str
    bound: str
    bound_agent: AgentId
    paused: AgentId
    archived: AgentId

    @property
    def tenant(self) -> Tenant:
        """The organization that does nothing wrong."""
        return self.edge.tenant

    @property
    def wrong_secret(self) -> str:
        """The tenant's token with another secret."""
        bearer = self.tenant.bearer
        return bearer[:-4] + ("AAAA" if not bearer.endswith("AAAA") else "BBBB")

    async def publish(self, *changes: tuple[str, UUID]) -> None:
        """What the command line does after its commit."""
        assert await publish_changes(self.redis_url, changes)


@pytest.fixture
async def cast(edge: Edge, redis_url: str, postgres_database: CuttableDatabase) -> Cast:
    """Everybody, as operators would make them."""
    admin, org = edge.admin, edge.tenant.org_id

    async def mint(**options: Any) -> str:
        return (await admin.mint_token(org, **options))[1]

    async def register(status: str) -> AgentId:
        agent = AgentId((await admin.register_agent(org, status))["agent_id"])
        if status != "active":
            await admin.set_status("agent", agent, status)
        return agent

    revoked, revoked_bearer = await admin.mint_token(org)
    await admin.revoke_token(revoked["token_id"])
    expired = await mint(expires_in=timedelta(milliseconds=1))
    suspended_org, suspended_user = await make_tenant(admin, "Gone"), await make_tenant(admin, "Left")
    await admin.set_status("organization", suspended_org.org_id, "suspended")
    await admin.set_status("user", suspended_user.user_id, "suspended")
    bound_agent = await register("active")
    await asyncio.sleep(0.01)
    return Cast(
        edge=edge,
        redis_url=redis_url,
        relay=postgres_database.relay,
        other=await make_tenant(admin, "Other"),
        suspended_org=suspended_org,
        suspended_user=suspended_user,
        unknown=mint_token().bearer,
        revoked=revoked_bearer,
        expired=expired,
        powerless=await mint(permissions=Permission(0)),
        read_only=await mint(permissions=PERMISSION_SETS["ReadOnly"]),
        almighty=await mint(permissions=PERMISSION_SETS["Admin"]),
        bound=await mint(agent=bound_agent),
        bound_agent=bound_agent,
        paused=await register("paused"),
        archived=await register("archived"),
    )
