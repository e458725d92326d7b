"""Whether every answer left its record: checkpoints in Postgres and traces in ClickHouse, counted after a run."""

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ibex.domain.identity import OrgId
from ibexctl.operation import operate

if TYPE_CHECKING:
    from ibex.config import Settings
    from ibex.runtime import Operator

_STALL_SECONDS = 20.0
"""Without a new record for so long, those that are missing are not coming."""


@dataclass(frozen=True, slots=True)
class Records:
    """What was found, and how long after the last answer all of it was there."""

    expected: int
    checkpoints: int
    traces: int
    seconds: float

    @property
    def is_whole(self) -> bool:
        """Whether each answer has exactly one of each."""
        return self.expected == self.checkpoints == self.traces


def count_records(settings: "Settings", org_id: OrgId, expected: int) -> Records:
    """Wait until both stores have as many records as expected, or get no more."""

    async def count(operator: "Operator") -> Records:
        from ibex.stores.counts import count_checkpoints, count_traces
        from ibex.stores.postgres.pool import Postgres

        begun = changed_at = time.monotonic()
        before = (-1, -1)
        postgres = await Postgres.connect(operator.addresses.postgres_admin, name="ibexctl bench")
        try:
            while True:
                found = (
                    await count_checkpoints(postgres, org_id),
                    await count_traces(operator.addresses.clickhouse, org_id),
                )
                now = time.monotonic()
                if found != before:
                    before, changed_at = found, now
                if min(found) >= expected or now - changed_at > _STALL_SECONDS:
                    return Records(expected, *found, round(now - begun, 3))
                await asyncio.sleep(0.2)
        finally:
            await postgres.close()

    return operate(count, settings=settings, clickhouse=True)
