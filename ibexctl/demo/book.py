"""The client's own book against both stores: every turn whose end was seen must be in each, once."""

import asyncio
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from uuid import UUID

from ibexctl.operation import operate

if TYPE_CHECKING:
    from ibex.config import Settings
    from ibex.domain.identity import OrgId
    from ibex.runtime import Operator

_STALL_SECONDS = 15.0
"""Without a new record for so long, those that are missing are not coming."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What one store has of the turns that clients saw whole."""

    once: int
    missing: int
    doubled: int
    unseen: int
    """Turns it has besides: their clients did not see the end."""

    @property
    def is_exact(self) -> bool:
        """Whether it has every one of them, once."""
        return not (self.missing or self.doubled)

    def __str__(self) -> str:
        return f"{self.once:,} once, {self.missing:,} missing, {self.doubled:,} twice"


def compare(seen: Collection[UUID], stored: Sequence[UUID]) -> Kept:
    """A store's turns against those in the book; a turn that was stored twice stands twice in `stored`."""
    counts, noted = Counter(stored), set(seen)
    return Kept(
        once=sum(counts[turn_id] == 1 for turn_id in noted),
        missing=len(noted - counts.keys()),
        doubled=sum(count > 1 for count in counts.values()),
        unseen=len(counts.keys() - noted),
    )


def check_book(settings: "Settings", org_id: "OrgId", seen: Collection[UUID]) -> tuple[Kept, Kept]:
    """What Postgres and ClickHouse have of an organization's turns, once both have all that was seen or get no more.

    Raises StoreUnavailable.
    """

    async def read(operator: "Operator") -> tuple[Kept, Kept]:
        from ibex.stores.tallies import Period

        now = datetime.now(UTC)
        period = Period(now - timedelta(hours=1), now + timedelta(hours=1))
        changed_at, before = time.monotonic(), None
        while True:
            kept = (
                compare(seen, [turn.turn_id for turn in await operator.sessions.find_turns(org_id, period)]),
                compare(seen, [turn.turn_id for turn in await operator.traces.find_turns(org_id, period)]),
            )
            if kept != before:
                before, changed_at = kept, time.monotonic()
            is_settled = not any(store.missing for store in kept) and kept[0].unseen == kept[1].unseen
            if is_settled or time.monotonic() - changed_at > _STALL_SECONDS:
                return kept
            await asyncio.sleep(0.25)

    return operate(read, settings=settings, clickhouse=True)
