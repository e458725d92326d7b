"""How many records an organization has: what a benchmark compares with the answers it got."""

import asyncio

from ibex.domain.identity import OrgId
from ibex.stores.clickhouse.client import ClickHouse, ClickHouseAddress, translated
from ibex.stores.postgres.pool import Postgres

_QUERY_SECONDS = 60.0


async def count_checkpoints(postgres: Postgres, org_id: OrgId) -> int:
    """The checkpoints of one organization. Raises StoreUnavailable."""
    async with postgres.transaction(org_ids=[org_id], timeout=_QUERY_SECONDS, operation="count_checkpoints") as found:
        return int(await found.fetchval("select count(*) from ibex_core.checkpoints where org_id = $1", org_id))


async def count_traces(dsn: str, org_id: OrgId) -> int:
    """The traces of one organization, in the ClickHouse at this DSN. Raises StoreUnavailable."""
    clickhouse = ClickHouse(ClickHouseAddress.parse(dsn))
    try:
        with translated():
            async with asyncio.timeout(_QUERY_SECONDS):
                result = await (await clickhouse.client()).query(
                    "select count() from llm_traces where org_id = {org:UUID}", parameters={"org": org_id}
                )
        return int(result.result_rows[0][0])
    finally:
        await clickhouse.close()
