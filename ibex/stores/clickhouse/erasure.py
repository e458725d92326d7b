"""Erasure in ClickHouse: whose traces must not be there any more, and their deletion."""

import asyncio
from collections.abc import Iterable
from datetime import timedelta
from typing import Any
from uuid import UUID

from ibex.domain.identity import OrgId
from ibex.errors import StoreUnavailable
from ibex.stores.clickhouse.client import ClickHouse, translated

_QUERY_SECONDS = 30.0
_POLL_SECONDS = 0.5
_LOOKUP_IDS = 2000
"""Ids in one query: well below ClickHouse's limit on its length (256 KiB)."""


class TraceErasure:
    """The table `erased_organizations`, and the deletion of traces of those in it.

    Whoever erases notes the organization first and deletes then; whoever inserts traces inserts first and asks then.
    Whichever was quicker, no trace of an erased organization stays.
    """

    def __init__(self, clickhouse: ClickHouse) -> None:
        self._clickhouse = clickhouse

    async def note(self, org_id: OrgId) -> None:
        """Have every trace of this organization that still comes dropped, for ever."""
        await self._command(f"insert into erased_organizations (org_id) values ('{_quoted(org_id)}')")  # noqa: S608

    async def find(self, org_ids: Iterable[UUID]) -> set[OrgId]:
        """Which of these organizations were erased."""
        asked, erased = list(set(org_ids)), set[OrgId]()
        for at in range(0, len(asked), _LOOKUP_IDS):
            some = ",".join(f"'{_quoted(org_id)}'" for org_id in asked[at : at + _LOOKUP_IDS])
            sql = f"select distinct org_id from erased_organizations where org_id in ({some})"  # noqa: S608 - ids only
            erased.update(OrgId(row[0]) for row in await self._query(sql))
        return erased

    async def find_left(self, age: timedelta) -> set[OrgId]:
        """Organizations that have traces although they were erased longer ago than `age`."""
        milliseconds = int(age.total_seconds() * 1000)
        sql = (
            "select distinct org_id from llm_traces where org_id in ("  # noqa: S608 - a number only
            "select org_id from erased_organizations group by org_id"
            f" having max(erased_at) < now64(3) - toIntervalMillisecond({milliseconds:d}))"
        )
        return {OrgId(row[0]) for row in await self._query(sql)}

    async def delete(self, org_ids: Iterable[UUID]) -> None:
        """Have ClickHouse delete the traces of these organizations that it has by now; it does so in the background."""
        doomed = list(org_ids)
        for at in range(0, len(doomed), _LOOKUP_IDS):
            some = ",".join(f"'{_quoted(org_id)}'" for org_id in doomed[at : at + _LOOKUP_IDS])
            await self._command(f"alter table llm_traces delete where org_id in ({some}) settings mutations_sync = 0")

    async def delete_all(self, org_id: OrgId, *, patience: float = 600) -> int:
        """Delete the traces of an organization and wait until they are gone; how many there were.

        Raises StoreUnavailable when ClickHouse is not done after `patience` (s): it goes on by itself.
        """
        found = await self._count(org_id)
        if found:
            await self.delete([org_id])
        try:
            async with asyncio.timeout(patience):
                while await self._count(org_id):  # noqa: ASYNC110 - ClickHouse tells nobody when it is done
                    await asyncio.sleep(_POLL_SECONDS)
        except TimeoutError:
            raise StoreUnavailable("ClickHouse is still deleting traces: run the same again.") from None
        return found

    async def _count(self, org_id: OrgId) -> int:
        sql = f"select count() from llm_traces where org_id = '{_quoted(org_id)}'"  # noqa: S608 - an id only
        return int((await self._query(sql))[0][0])

    async def _query(self, sql: str) -> list[tuple[Any, ...]]:
        with translated():
            async with asyncio.timeout(_QUERY_SECONDS):
                result = await (await self._clickhouse.client()).query(sql)
        return [tuple(row) for row in result.result_rows]

    async def _command(self, sql: str) -> None:
        with translated():
            async with asyncio.timeout(_QUERY_SECONDS):
                await (await self._clickhouse.client()).command(sql)


def _quoted(org_id: UUID) -> UUID:
    """Only what is a UUID reaches the text of a statement."""
    return UUID(bytes=org_id.bytes)
