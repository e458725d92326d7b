"""Waiting until one transaction stands in another's way."""

import asyncio

from ibex.stores.postgres.pool import Postgres

_WAITING = """
select exists (select from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock')
"""


async def wait_for_lock(owner: Postgres) -> None:
    """Until somebody waits for a lock in this database."""
    async with asyncio.timeout(10):
        while True:
            async with owner.transaction() as connection:
                if await connection.fetchval(_WAITING):
                    return
            await asyncio.sleep(0.01)
