"""Tokens that mint: only a valid one does, nothing of it is exceeded, and the audit names it."""

import asyncio
from datetime import timedelta

import pytest

from ibex.domain.delegation import Wish
from ibex.domain.identity import DEV_TOKEN, PERMISSION_SETS, PROXY_CHAT, AgentId, OrgId, Permission, mint_token
from ibex.errors import OperatorError, UnknownEntity
from ibex.stores.postgres.identity_admin import IdentityAdmin
from ibex.stores.postgres.pool import Postgres
from tests.tenants import Tenant, make_tenant

MINTS = PROXY_CHAT | Permission.TOKEN_CREATE
WISH = Wish(PROXY_CHAT)


@pytest.fixture
async def tenant(admin: IdentityAdmin) -> Tenant:
    return await make_tenant(admin, "acme")


async def test_what_is_not_wished_is_as_the_minters(admin: IdentityAdmin, owner: Postgres, tenant: Tenant) -> None:
    minter, bearer = await admin.mint_token(
        tenant.org_id, agent=tenant.agent_id, permissions=MINTS, expires_in=timedelta(hours=1)
    )
    made, new_bearer = await admin.mint_token_by(bearer, WISH, name="child")
    for same in ("org_id", "user_id", "agent_id", "expires_at"):
        assert made[same] == minter[same]
    assert (made["permissions"], made["name"]) == (PROXY_CHAT, "child")
    assert new_bearer.startswith(f"{made['prefix']}_")
    async with owner.transaction() as connection:
        event = await connection.fetchrow(
            "select actor, action, details::text from ibex_core.audit_events where entity_id = $1", made["token_id"]
        )
    assert (event["actor"], event["action"]) == (minter["prefix"], "mint")
    assert bearer not in event["details"]


async def test_a_child_never_outlives_its_minter_by_a_microsecond(admin: IdentityAdmin, tenant: Tenant) -> None:
    minter, bearer = await admin.mint_token(tenant.org_id, permissions=MINTS, expires_in=timedelta(hours=1))
    sooner, _ = await admin.mint_token_by(bearer, Wish(PROXY_CHAT, expires_in=timedelta(minutes=1)))
    assert sooner["expires_at"] < minter["expires_at"]
    with pytest.raises(OperatorError, match="outlives"):
        await admin.mint_token_by(bearer, Wish(PROXY_CHAT, expires_in=timedelta(hours=1, seconds=1)))


async def test_a_child_cannot_pass_on_what_it_was_not_given(admin: IdentityAdmin, tenant: Tenant) -> None:
    _, bearer = await admin.mint_token(tenant.org_id, permissions=PERMISSION_SETS["Admin"])
    _, child = await admin.mint_token_by(bearer, Wish(MINTS))
    _, grandchild = await admin.mint_token_by(child, WISH)
    with pytest.raises(OperatorError, match="lacks DIRECTIVE_READ"):
        await admin.mint_token_by(child, Wish(PROXY_CHAT | Permission.DIRECTIVE_READ))
    with pytest.raises(OperatorError, match="TOKEN_CREATE"):
        await admin.mint_token_by(grandchild, WISH)


async def test_a_token_that_is_not_valid_mints_nothing_and_all_are_told_the_same(
    admin: IdentityAdmin, tenant: Tenant
) -> None:
    row, revoked = await admin.mint_token(tenant.org_id, permissions=MINTS)
    await admin.revoke_token(row["token_id"])
    _, expired = await admin.mint_token(tenant.org_id, permissions=MINTS, expires_in=timedelta(milliseconds=1))
    valid, bearer = await admin.mint_token(tenant.org_id, permissions=MINTS)
    another_secret = f"{valid['prefix']}_{mint_token().bearer.rpartition('_')[2][:43]:A<43}"
    _, bound = await admin.mint_token(tenant.org_id, agent=tenant.agent_id, permissions=MINTS)
    await admin.set_status("agent", tenant.agent_id, "paused")
    await asyncio.sleep(0.01)
    told = set()
    for wrong in (revoked, expired, another_secret, bound, mint_token().bearer, "nonsense", "", DEV_TOKEN, bearer[:-1]):
        with pytest.raises(OperatorError) as refusal:
            await admin.mint_token_by(wrong, WISH)
        told.add(refusal.value.message)
    assert told == {"The token that is to mint is not valid."}


@pytest.mark.parametrize("kind", ["organization", "user"])
async def test_suspending_whose_it_is_stops_it(admin: IdentityAdmin, tenant: Tenant, kind: str) -> None:
    _, bearer = await admin.mint_token(tenant.org_id, permissions=MINTS)
    await admin.set_status(kind, tenant.org_id if kind == "organization" else tenant.user_id, "suspended")  # type: ignore[arg-type]
    with pytest.raises(OperatorError, match="not valid"):
        await admin.mint_token_by(bearer, WISH)


async def test_an_agent_of_another_organization_cannot_be_bound_to(admin: IdentityAdmin, tenant: Tenant) -> None:
    other = await make_tenant(admin, "other")
    _, bearer = await admin.mint_token(tenant.org_id, permissions=MINTS)
    with pytest.raises(UnknownEntity):
        await admin.mint_token_by(bearer, Wish(PROXY_CHAT, agent_id=AgentId(other.agent_id)))
    with pytest.raises(OperatorError, match="its own organization"):
        await admin.mint_token_by(bearer, Wish(PROXY_CHAT, org_id=OrgId(other.org_id)))
