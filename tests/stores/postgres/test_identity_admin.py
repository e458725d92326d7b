"""What operators do to identity: each deed once, audited, and known by its changes."""

import json
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest

from ibex.domain.identity import AgentId, OrgId, Permission, digest_bearer, parse_bearer
from ibex.errors import OperatorError, StoreRefused, UnknownEntity
from ibex.stores.postgres.identity_admin import IdentityAdmin
from ibex.stores.postgres.pool import Postgres
from tests.tenants import Tenant, make_tenant

NOWHERE, NOBODY = OrgId(UUID(int=99)), AgentId(UUID(int=98))


async def audit(owner: Postgres) -> list[tuple[str, str, str, UUID]]:
    async with owner.transaction() as connection:
        rows = await connection.fetch("select * from ibex_core.audit_events order by created_at, audit_event_id")
    return [(row["actor"], row["action"], row["entity_kind"], row["entity_id"]) for row in rows]


async def test_every_deed_leaves_an_audit_event_and_its_changes(admin: IdentityAdmin, owner: Postgres) -> None:
    one = await make_tenant(admin, "acme")
    await admin.set_limit(one.org_id, 600)
    await admin.set_limit(one.org_id, 60, one.agent_id)
    await admin.set_status("agent", one.agent_id, "paused")
    await admin.revoke_token(one.token_id)
    assert await audit(owner) == [
        ("tester", "create", "organization", one.org_id),
        ("tester", "register", "agent", one.agent_id),
        ("tester", "mint", "token", one.token_id),
        ("tester", "set_limit", "limit", one.org_id),
        ("tester", "set_limit", "limit", one.agent_id),
        ("tester", "set_status", "agent", one.agent_id),
        ("tester", "revoke", "token", one.token_id),
    ]
    assert [(change.kind, change.entity_id) for change in admin.changes] == [
        ("organization", one.org_id),
        ("user", one.user_id),
        ("agent", one.agent_id),
        ("token", one.token_id),
        ("limit", one.org_id),
        ("limit", one.agent_id),
        ("agent", one.agent_id),
        ("token", one.token_id),
    ]


async def test_a_deed_that_fails_leaves_neither(admin: IdentityAdmin, owner: Postgres) -> None:
    with pytest.raises(UnknownEntity):
        await admin.register_agent(NOWHERE, "nobody's")
    with pytest.raises(StoreRefused):
        await admin.mint_token((await admin.create_org("acme"))["org_id"], permissions=Permission(1 << 60))
    assert [action for _, action, _, _ in await audit(owner)] == ["create"]
    assert [change.kind for change in admin.changes] == ["organization", "user"]


async def test_an_organization_starts_with_a_user(admin: IdentityAdmin) -> None:
    row = await admin.create_org("Acme Corporation")
    assert set(row) == {"org_id", "name", "status", "created_at", "user_id"}
    assert (row["name"], row["status"]) == ("Acme Corporation", "active")
    assert await admin.list_org_ids() == [row["org_id"]]


@pytest.mark.parametrize("name", ["", "x" * 201, "nul\0", "line\n"])
async def test_a_name_that_is_none_is_refused(name: str, admin: IdentityAdmin) -> None:
    with pytest.raises(OperatorError, match="printable"):
        await admin.create_org(name)


async def test_a_limit_is_set_changed_and_removed(tenant: Tenant, admin: IdentityAdmin, owner: Postgres) -> None:
    for rpm in (600, 700):
        assert await admin.set_limit(tenant.org_id, rpm) == {"org_id": tenant.org_id, "agent_id": None, "rpm": rpm}
    await admin.set_limit(tenant.org_id, 5, tenant.agent_id)
    await admin.set_limit(tenant.org_id, None)
    async with owner.transaction() as connection:
        rows = await connection.fetch("select agent_id, rpm from ibex_core.limits")
    assert [(row["agent_id"], row["rpm"]) for row in rows] == [(tenant.agent_id, 5)]
    for rpm in (0, 1_000_001):
        with pytest.raises(OperatorError):
            await admin.set_limit(tenant.org_id, rpm)


async def test_a_token_is_shown_once_and_kept_as_its_digest(
    tenant: Tenant, admin: IdentityAdmin, owner: Postgres
) -> None:
    row, bearer = await admin.mint_token(
        tenant.org_id,
        name="ci",
        agent=tenant.agent_id,
        permissions=Permission.TRACE_READ,
        expires_in=timedelta(days=30),
    )
    assert parse_bearer(bearer) == row["token_id"]
    assert "digest" not in row
    assert bearer not in str(row)
    assert (row["prefix"], row["permissions"]) == (f"ibex_pat_{row['token_id']}", Permission.TRACE_READ)
    assert abs(row["expires_at"] - datetime.now(UTC) - timedelta(days=30)) < timedelta(minutes=1)
    async with owner.transaction() as connection:
        stored = await connection.fetchrow("select * from ibex_core.tokens where token_id = $1", row["token_id"])
        events = await connection.fetch("select details from ibex_core.audit_events")
    assert stored is not None
    assert stored["digest"] == digest_bearer(bearer)
    assert (stored["user_id"], stored["agent_id"]) == (tenant.user_id, tenant.agent_id)
    secret = bearer.rpartition("_")[2]
    assert secret not in json.dumps([event["details"] for event in events])
    assert secret not in str(dict(stored))


async def test_a_token_cannot_be_minted_across_organizations(
    tenants: tuple[Tenant, Tenant], admin: IdentityAdmin
) -> None:
    ours, theirs = tenants
    for binding in ({"agent": theirs.agent_id}, {"agent": NOBODY}, {"user": theirs.user_id}):
        with pytest.raises(UnknownEntity):
            await admin.mint_token(ours.org_id, **binding)
    with pytest.raises(UnknownEntity):
        await admin.mint_token(NOWHERE)
    with pytest.raises(OperatorError):
        await admin.mint_token(ours.org_id, expires_in=timedelta())


async def test_a_token_is_revoked_once_by_id_prefix_or_itself(
    tenant: Tenant, admin: IdentityAdmin, owner: Postgres
) -> None:
    first = await admin.revoke_token(tenant.token_id)
    assert first["revoked_at"] is not None
    for name in (str(tenant.token_id), f"ibex_pat_{tenant.token_id}", tenant.bearer):
        assert await admin.revoke_token(name) == first
    assert [action for _, action, _, _ in await audit(owner)].count("revoke") == 1


@pytest.mark.parametrize("name", ["ibex_pat_", "nonsense", "ibex_pat_x' or '1'='1", f"{UUID(int=5)}"])
async def test_what_names_no_token_is_unknown(name: str, tenant: Tenant, admin: IdentityAdmin) -> None:
    with pytest.raises(UnknownEntity) as caught:
        await admin.revoke_token(name)
    assert caught.value.hint


async def test_all_tokens_of_an_organization_or_an_agent_are_revoked(
    tenants: tuple[Tenant, Tenant], admin: IdentityAdmin, owner: Postgres
) -> None:
    ours, _ = tenants
    bound, _ = await admin.mint_token(ours.org_id, agent=ours.agent_id)
    assert [row["token_id"] for row in await admin.revoke_tokens(ours.org_id, agent=ours.agent_id)] == [
        bound["token_id"]
    ]
    assert [row["token_id"] for row in await admin.revoke_tokens(ours.org_id)] == [ours.token_id]
    assert await admin.revoke_tokens(ours.org_id) == []
    async with owner.transaction() as connection:
        left = await connection.fetch("select org_id from ibex_core.tokens where revoked_at is null")
    assert [row["org_id"] for row in left] == [tenants[1].org_id]


async def test_a_status_comes_and_goes(tenant: Tenant, admin: IdentityAdmin) -> None:
    assert (await admin.set_status("organization", tenant.org_id, "suspended"))["status"] == "suspended"
    assert (await admin.set_status("organization", tenant.org_id, "active"))["status"] == "active"
    with pytest.raises(OperatorError, match="active, suspended"):
        await admin.set_status("user", tenant.user_id, "archived")
    with pytest.raises(UnknownEntity):
        await admin.set_status("agent", uuid4(), "paused")
