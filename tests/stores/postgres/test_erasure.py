"""An erasure gives way to recorders as often as they need it, and is done in the end."""

import asyncio

from ibex.stores.postgres.erasure import ErasedRecords, OrganizationEraser
from ibex.stores.postgres.pool import Postgres
from tests.stores.locks import wait_for_lock
from tests.tenants import Tenant


async def test_an_eraser_that_a_recorder_stands_in_the_way_of_begins_again_and_counts_once(
    owner: Postgres, app: Postgres, tenants: tuple[Tenant, Tenant]
) -> None:
    """The recorder holds a session and needs its agent for a new one; the eraser holds the agent and needs the session.

    Postgres ends the one that waited first, which here is the eraser.
    """
    ours = tenants[0]
    async with app.transaction(org_ids=[ours.org_id], timeout=20) as recorder:
        await recorder.execute("update ibex_core.sessions set turn_count = turn_count")
        erasing = asyncio.ensure_future(OrganizationEraser(owner).delete_tenancy(ours.org_id))
        await wait_for_lock(owner)
        await recorder.execute(
            "insert into ibex_core.sessions (session_id, org_id, agent_id, external_id, last_turn_at)"
            " values (gen_random_uuid(), $1, $2, 'new', now())",
            *(ours.org_id, ours.agent_id),
        )
    assert await erasing == ErasedRecords(checkpoints=1, sessions=2)
