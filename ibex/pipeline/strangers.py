"""What a caller nobody knows yet may cost: limits on look-ups, and a short memory of tokens that were refused."""

import asyncio
from collections import OrderedDict
from collections.abc import Hashable
from time import monotonic
from uuid import UUID

from ibex.errors import RateLimited

ADDRESS_RATE, ADDRESS_BURST = 50.0, 200.0
"""Look-ups of unknown tokens a second from one address."""
TOTAL_RATE, TOTAL_BURST = 500.0, 500.0
"""Look-ups of unknown tokens a second in all."""
LONGEST_WAIT = 1.0
REFUSED_SECONDS = 10.0
_MOST_ADDRESSES = 10_000
_MOST_REFUSED = 10_000


class _Bucket:
    """A token bucket; taking more than it holds puts the taker in a queue, as seconds to wait."""

    __slots__ = ("_burst", "_level", "_rate", "_seen")

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._level = burst
        self._seen = monotonic()

    def wait(self) -> float:
        """Seconds until a place is free."""
        moment = monotonic()
        self._level = min(self._burst, self._level + (moment - self._seen) * self._rate)
        self._seen = moment
        return max(0.0, (1.0 - self._level) / self._rate)

    def take(self) -> None:
        self._level -= 1.0


class StrangerGate:
    """Places for look-ups of tokens this process does not know. Tokens known good never meet it."""

    def __init__(self) -> None:
        self._total = _Bucket(TOTAL_RATE, TOTAL_BURST)
        self._addresses: OrderedDict[str, _Bucket] = OrderedDict()

    async def enter(self, address: str) -> None:
        """Wait up to a second for a place; raises RateLimited when there is none."""
        bucket = self._addresses.get(address)
        if bucket is None:
            bucket = self._addresses[address] = _Bucket(ADDRESS_RATE, ADDRESS_BURST)
            if len(self._addresses) > _MOST_ADDRESSES:
                self._addresses.popitem(last=False)
        self._addresses.move_to_end(address)
        wait = max(bucket.wait(), self._total.wait())
        if wait > LONGEST_WAIT:
            raise RateLimited("Too many requests with tokens that are not known here.", headers={"Retry-After": "1"})
        bucket.take()
        self._total.take()
        if wait > 0.0:
            await asyncio.sleep(wait)


class RefusedTokens:
    """Tokens and agents that were looked up and refused, for ten seconds: the database is not asked again so soon."""

    def __init__(self) -> None:
        self._entries: OrderedDict[Hashable, tuple[float, frozenset[UUID]]] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        entry = self._entries.get(key)
        return entry is not None and entry[0] > monotonic()

    def add(self, key: Hashable, ids: frozenset[UUID]) -> None:
        """Remember a refusal, until one of `ids` changes."""
        self._entries[key] = (monotonic() + REFUSED_SECONDS, ids)
        self._entries.move_to_end(key)
        while len(self._entries) > _MOST_REFUSED:
            self._entries.popitem(last=False)

    def forget(self, entity_id: UUID | None) -> None:
        """Drop what rests on this id; None drops everything."""
        if entity_id is None:
            self._entries.clear()
            return
        for key in [key for key, (_, ids) in self._entries.items() if entity_id in ids]:
            del self._entries[key]
