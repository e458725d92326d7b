"""A node whose cable to the stores is cut, while clients and the provider still reach it (`make test-chaos`)."""

import asyncio
import os

import pytest

from tests.network.calls import chat, recorded, served, until
from tests.network.conftest import HEARD_SECONDS, Cluster
from tests.network.wiring import POSTGRES

pytestmark = pytest.mark.skipif("CHAOS_ROUNDS" not in os.environ, reason="a long test: make test-chaos")


async def test_a_node_cut_off_from_postgres_serves_whom_it_knows_and_records_it_later(cluster: Cluster) -> None:
    known, unknown = await cluster.make_tenant("known"), await cluster.make_tenant("unknown")

    async with cluster.client() as http:
        turns = await served(http, cluster.b, known, 1)
        with cluster.b.machine.cut_off_from(POSTGRES):
            turns += await served(http, cluster.b, known, 5)
            assert (await chat(http, cluster.b, unknown))[:2] == (503, "SERVICE_DEGRADED")
            turns += await served(http, cluster.a, known, 5)

    await recorded(cluster, known, turns)


async def test_a_node_that_hears_no_store_serves_nobody_and_comes_back(cluster: Cluster) -> None:
    tenant, revoked = await cluster.make_tenant("partitioned"), await cluster.make_tenant("revoked meanwhile")

    async with cluster.client() as http:
        await served(http, cluster.b, tenant, 1)
        await served(http, cluster.b, revoked, 1)
        with cluster.b.machine.unplugged():
            await asyncio.to_thread(cluster.a.ctl, "token", "revoke", str(revoked.token_id), within=20)
            refusals = {(503, "SERVICE_DEGRADED"), (401, "INVALID_TOKEN")}
            seconds = await until(cluster.b, revoked, http, refusals)
            assert seconds <= HEARD_SECONDS + 2  # one more question of 1 s, and a busy machine
            assert (await chat(http, cluster.b, tenant))[:2] == (503, "SERVICE_DEGRADED")
            await served(http, cluster.a, tenant, 1)
        await until(cluster.b, tenant, http, {(200, None)})

        assert (await chat(http, cluster.b, revoked))[:2] == (401, "INVALID_TOKEN")
