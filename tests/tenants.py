"""Organizations for tests, made as operators make them."""

from dataclasses import dataclass
from typing import Any

from ibex.domain.identity import AgentId, OrgId, TokenId, UserId
from ibex.domain.turns import Turn
from ibex.stores.postgres.identity_admin import IdentityAdmin
from tests.turns import make_turn


@dataclass(frozen=True, slots=True)
class Tenant:
    """An organization with a user, an agent and a token."""

    org_id: OrgId
    user_id: UserId
    agent_id: AgentId
    token_id: TokenId
    bearer: str

    def make_turn(self, external_id: str = "s-1", **changes: Any) -> Turn:
        """A whole turn of this organization's agent."""
        return make_turn(**{"org_id": self.org_id, "agent_id": self.agent_id, "external_id": external_id, **changes})


async def make_tenant(admin: IdentityAdmin, name: str) -> Tenant:
    """Create an organization, its first user, an agent, and a token."""
    org = await admin.create_org(name)
    agent = await admin.register_agent(org["org_id"], f"{name}'s agent")
    token, bearer = await admin.mint_token(org["org_id"], name=f"{name}'s token")
    return Tenant(org["org_id"], org["user_id"], agent["agent_id"], token["token_id"], bearer)
