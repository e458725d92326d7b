"""Tokens that mint: only a valid one does, nothing of it is exceeded, and the audit names it."""

import asyncio
from datetime import timedelta

import pytest

from ibex.domain.delegation import Wish
from ibex.domain.identity import DEV_TOKEN, PERMISSION_SETS, PROXY_CHAT, AgentId, OrgId, Permission, mint_token
from ibex.errors import OperatorError, UnknownEntity
from ibex.stores.postgres.identity_admin import IdentityAdmin
from ibex.stores.postgres.pool import Postgres
from tests.stores.locks import wait_for_lock
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


@pytest.mark.parametrize("span", [timedelta(), timedelta(seconds=-1), timedelta(days=-400)])
async def test_nothing_is_minted_that_has_expired(admin: IdentityAdmin, tenant: Tenant, span: timedelta) -> None:
    row, bearer = await admin.mint_token(tenant.org_id, permissions=MINTS)
    for minting in (
        admin.mint_token(tenant.org_id, expires_in=span),
        admin.mint_token_by(bearer, Wish(PROXY_CHAT, expires_in=span)),
        admin.rotate_token(row["token_id"], grace=timedelta(hours=1), expires_in=span),
    ):
        with pytest.raises(OperatorError, match="in the future"):
            await minting


async def revoked(owner: Postgres) -> set[str]:
    async with owner.transaction() as connection:
        rows = await connection.fetch("select name from ibex_core.tokens where revoked_at is not null")
    return {row["name"] for row in rows}


async def test_all_that_a_token_minted_is_revoked_down_to_its_grandchildren_and_their_successors(
    admin: IdentityAdmin, owner: Postgres, tenant: Tenant
) -> None:
    leaked, bearer = await admin.mint_token(tenant.org_id, permissions=MINTS, name="leaked")
    _, other = await admin.mint_token(tenant.org_id, permissions=MINTS, name="other")
    await admin.mint_token_by(other, WISH, name="other's")
    _, child = await admin.mint_token_by(bearer, Wish(MINTS), name="child")
    grandchild, _ = await admin.mint_token_by(child, WISH, name="grandchild")
    await admin.rotate_token(grandchild["token_id"], grace=timedelta(hours=1))
    await admin.rotate_token(leaked["token_id"], grace=timedelta(hours=1))
    admin.changes.clear()
    rows, minter = await admin.revoke_minted_by(leaked["prefix"])
    assert sorted(row["name"] for row in rows) == ["child", "grandchild", "grandchild"]
    assert await revoked(owner) == {"child", "grandchild"}
    assert (minter["token_id"], minter["revoked_at"]) == (leaked["token_id"], None)
    assert {change.entity_id for change in admin.changes} == {row["token_id"] for row in rows}
    async with owner.transaction() as connection:
        events = await connection.fetch(
            "select entity_id, details ->> 'minted_by' as minter from ibex_core.audit_events where action = 'revoke'"
        )
    assert {(event["entity_id"], event["minter"]) for event in events} == {
        (row["token_id"], str(leaked["token_id"])) for row in rows
    }
    assert await admin.revoke_minted_by(leaked["token_id"]) == ([], minter)
    with pytest.raises(UnknownEntity):
        await admin.revoke_minted_by(mint_token().token_id)


async def test_what_is_being_minted_meanwhile_is_revoked_too(
    admin: IdentityAdmin, owner: Postgres, tenant: Tenant
) -> None:
    """The child mints while its row is waited for: its grandchild is in no snapshot of the first statement."""
    leaked, bearer = await admin.mint_token(tenant.org_id, permissions=MINTS, name="leaked")
    child, _ = await admin.mint_token_by(bearer, Wish(MINTS), name="child")
    grandchild = mint_token()
    async with owner.transaction(timeout=20) as minting:
        await minting.execute("select from ibex_core.tokens where token_id = $1 for no key update", child["token_id"])
        revoking = asyncio.ensure_future(admin.revoke_minted_by(leaked["token_id"]))
        await wait_for_lock(owner)
        await minting.execute(
            "insert into ibex_core.tokens (token_id, org_id, user_id, name, prefix, digest, permissions)"
            " values ($1, $2, $3, 'grandchild', $4, $5, 0)",
            *(grandchild.token_id, tenant.org_id, tenant.user_id, f"ibex_pat_{grandchild.token_id}", grandchild.digest),
        )
        await minting.execute(
            "insert into ibex_core.audit_events (org_id, actor, action, entity_kind, entity_id, details)"
            " values ($1, $2, 'mint', 'token', $3, '{}')",
            *(tenant.org_id, child["prefix"], grandchild.token_id),
        )
    rows, _ = await revoking
    assert [row["name"] for row in rows] == ["child", "grandchild"]
