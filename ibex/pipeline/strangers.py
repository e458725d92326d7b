"""What a caller nobody knows yet may cost: limits on look-ups, and a short memory of what was refused."""

import asyncio
from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from time import monotonic
from uuid import UUID

from ibex.errors import RateLimited
from ibex.pipeline.principals import Entry, Key

ADDRESS_RATE, ADDRESS_BURST = 50.0, 200.0
"""Look-ups of unknown tokens a second from one address."""
TOTAL_RATE, TOTAL_BURST = 500.0, 500.0
"""Look-ups of unknown tokens a second in all: the workers of a node share them, since they share its database."""
LONGEST_WAIT = 1.0
REFUSED_SECONDS = 10.0
MOST_ADDRESSES = 10_000
MOST_REFUSED = 10_000


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
    """Places for look-ups of callers this process does not know. Callers known good never meet it."""

    def __init__(self, *, workers: int = 1) -> None:
        self._total = _Bucket(TOTAL_RATE / workers, TOTAL_BURST / workers)
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    async def enter(self, address: str) -> None:
        """Wait up to a second for a place for an unknown token; raises RateLimited when there is none."""
        await self._enter([self._bucket(address), self._total])

    async def enter_known(self, token_id: UUID) -> None:
        """The same for a token known good that presents an agent never seen with it: its places are its own.

        No stranger can use them up, and a client that makes agents up costs nobody else a place.
        """
        await self._enter([self._bucket(str(token_id))])

    def _bucket(self, name: str) -> _Bucket:
        bucket = self._buckets.get(name)
        if bucket is None:
            bucket = self._buckets[name] = _Bucket(ADDRESS_RATE, ADDRESS_BURST)
            if len(self._buckets) > MOST_ADDRESSES:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(name)
        return bucket

    async def _enter(self, buckets: list[_Bucket]) -> None:
        wait = max(bucket.wait() for bucket in buckets)
        if wait > LONGEST_WAIT:
            raise RateLimited("Too many requests with tokens that are not known here.", headers={"Retry-After": "1"})
        for bucket in buckets:
            bucket.take()
        if wait > 0.0:
            await asyncio.sleep(wait)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A look-up that let nobody in."""

    entry: Entry | None
    """What was read of a good token whose agent is not its organization's; None: the token is not valid."""
    ids: tuple[UUID, ...]
    expires_at: float


class Refusals:
    """What was looked up and refused, for ten seconds: the database is not asked again so soon."""

    def __init__(self) -> None:
        self._refusals: OrderedDict[Key, Refusal] = OrderedDict()
        self._keys: defaultdict[UUID, set[Key]] = defaultdict(set)

    def __len__(self) -> int:
        return len(self._refusals)

    def find(self, key: Key) -> Refusal | None:
        """The refusal of this caller that still holds."""
        refusal = self._refusals.get(key)
        if refusal is not None and refusal.expires_at <= monotonic():
            self._drop(key)
            return None
        return refusal

    def add(self, key: Key, entry: Entry | None, ids: Iterable[UUID]) -> None:
        """Remember a refusal, until one of `ids` changes."""
        self._drop(key)
        self._refusals[key] = refusal = Refusal(entry, tuple(ids), monotonic() + REFUSED_SECONDS)
        for entity_id in refusal.ids:
            self._keys[entity_id].add(key)
        if len(self._refusals) > MOST_REFUSED:
            self._drop(next(iter(self._refusals)))

    def forget(self, entity_id: UUID | None) -> None:
        """Drop what rests on this id; everything for None."""
        if entity_id is None:
            self._refusals.clear()
            self._keys.clear()
        for key in list(self._keys.get(entity_id, ()) if entity_id is not None else ()):
            self._drop(key)

    def _drop(self, key: Key) -> None:
        refusal = self._refusals.pop(key, None)
        for entity_id in refusal.ids if refusal is not None else ():
            resting = self._keys[entity_id]
            resting.discard(key)
            if not resting:
                del self._keys[entity_id]
