"""Two nodes that share their stores over a network: what both agree on, and what becomes of the turns of a lost one."""

import asyncio

import aiohttp
import pytest

from tests.network.calls import Stream, recorded, served, until
from tests.network.conftest import HEARD_SECONDS, Cluster
from tests.network.wiring import CLICKHOUSE, POSTGRES


async def test_a_session_across_both_nodes_has_indexes_without_gaps(cluster: Cluster) -> None:
    tenant = await cluster.make_tenant("across")

    async with cluster.client() as http:
        rounds = await asyncio.gather(*(served(http, node, tenant, 10) for node in (cluster.a, cluster.b) * 2))

    await recorded(cluster, tenant, [turn for turns in rounds for turn in turns])


async def test_a_revocation_at_one_node_is_heard_by_the_other(cluster: Cluster) -> None:
    tenant = await cluster.make_tenant("revoked")

    async with cluster.client() as http:
        await served(http, cluster.b, tenant, 1)
        await asyncio.to_thread(cluster.a.ctl, "token", "revoke", str(tenant.token_id), within=20)

        assert await until(cluster.b, tenant, http, {(401, "INVALID_TOKEN")}) <= HEARD_SECONDS


async def test_the_turns_of_a_lost_node_are_delivered_elsewhere_once(cluster: Cluster) -> None:
    tenant = await cluster.make_tenant("lost")
    lost = cluster.make_node("lost")
    lost.start()

    async with cluster.client() as http:
        turns = await served(http, lost, tenant, 3)
        with lost.machine.cut_off_from(POSTGRES, CLICKHOUSE):
            turns += await served(http, lost, tenant, 20)
            there, elsewhere = (Stream(http, node, tenant) for node in (lost, cluster.b))
            await asyncio.gather(there.begun(), elsewhere.begun())
            lost.kill()
        with pytest.raises(aiohttp.ClientError):
            await there.end
        assert await elsewhere.end
        turns += [elsewhere.turn, *await served(http, cluster.b, tenant, 2)]

    journal = str(lost.data_dir / "journal")
    await asyncio.to_thread(cluster.b.ctl, "journal", "deliver", journal, within=60)  # fails when something is left
    await recorded(cluster, tenant, turns)
