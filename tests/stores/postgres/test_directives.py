"""Directives: immutable numbered versions, and a pointer to the one in force."""

import asyncio
from uuid import uuid4

import pytest

from ibex.domain.directives import MAX_DIRECTIVE_BYTES, Directive, DirectiveMode
from ibex.domain.identity import AgentId
from ibex.errors import OperatorError, UnknownEntity
from ibex.stores.postgres.directives import DirectiveAdmin, DirectiveReader
from ibex.stores.postgres.pool import Postgres
from tests.tenants import Tenant


@pytest.fixture
def reader(app: Postgres) -> DirectiveReader:
    """The reader in the application's role."""
    return DirectiveReader(app)


async def test_an_agent_without_a_directive_has_none(tenant: Tenant, reader: DirectiveReader) -> None:
    assert await reader.in_force(tenant.org_id, tenant.agent_id) is None


async def test_the_latest_version_is_in_force_until_it_is_rolled_back(
    tenant: Tenant, directives: DirectiveAdmin, reader: DirectiveReader
) -> None:
    agent_id = tenant.agent_id
    assert await directives.set(agent_id, "Be brief.", DirectiveMode.SYSTEM_FIRST) == 1
    assert await directives.set(agent_id, "Répondez. 🦌", DirectiveMode.USER_PREPEND) == 2
    assert await reader.in_force(tenant.org_id, agent_id) == Directive(2, DirectiveMode.USER_PREPEND, "Répondez. 🦌")
    assert await directives.roll_back(agent_id, 1) == 1
    assert await reader.in_force(tenant.org_id, agent_id) == Directive(1, DirectiveMode.SYSTEM_FIRST, "Be brief.")
    assert await directives.set(agent_id, "Be brief.", DirectiveMode.SYSTEM_APPEND) == 3
    await directives.clear(agent_id)
    assert await reader.in_force(tenant.org_id, agent_id) is None
    assert await directives.set(agent_id, "x" * MAX_DIRECTIVE_BYTES) == 4
    assert [change.kind for change in directives.changes] == ["directive"] * 6
    assert {change.entity_id for change in directives.changes} == {agent_id}
    versions = await directives.list_versions(agent_id)
    assert [(row["version"], row["is_in_force"]) for row in versions] == [(1, False), (2, False), (3, False), (4, True)]
    assert all("text" not in row for row in versions)


async def test_another_organization_does_not_see_it(tenants: tuple[Tenant, Tenant], reader: DirectiveReader) -> None:
    ours, theirs = tenants
    assert await reader.in_force(ours.org_id, theirs.agent_id) is None


async def test_versions_written_at_once_are_numbered_without_gaps(
    tenant: Tenant, directives: DirectiveAdmin, reader: DirectiveReader
) -> None:
    texts = [f"Version {number}." for number in range(8)]
    numbers = await asyncio.gather(*(directives.set(tenant.agent_id, text) for text in texts))
    assert sorted(numbers) == list(range(1, 9))
    found = await reader.in_force(tenant.org_id, tenant.agent_id)
    assert found is not None
    assert (found.version, found.text) == (8, texts[numbers.index(8)])


@pytest.mark.parametrize("text", ["", " ", "x" * (MAX_DIRECTIVE_BYTES + 1), "nul\0", "\ud800"])
async def test_a_text_that_cannot_be_a_directive_is_refused(
    text: str, tenant: Tenant, directives: DirectiveAdmin
) -> None:
    with pytest.raises(OperatorError):
        await directives.set(tenant.agent_id, text)


async def test_what_does_not_exist_is_unknown(tenant: Tenant, directives: DirectiveAdmin) -> None:
    with pytest.raises(UnknownEntity):
        await directives.set(AgentId(uuid4()), "Be brief.")
    with pytest.raises(UnknownEntity, match="no directive version 3"):
        await directives.roll_back(tenant.agent_id, 3)
    with pytest.raises(UnknownEntity):
        await directives.clear(AgentId(uuid4()))


async def test_the_audit_holds_the_digest_and_not_the_text(
    tenant: Tenant, directives: DirectiveAdmin, owner: Postgres
) -> None:
    await directives.set(tenant.agent_id, "Reveal nothing.")
    async with owner.transaction() as connection:
        details = await connection.fetchval(
            "select details from ibex_core.audit_events where entity_kind = 'directive' and actor = 'tester'"
        )
    assert Directive(1, DirectiveMode.SYSTEM_FIRST, "Reveal nothing.").sha256.hex() in details
    assert "Reveal" not in details
