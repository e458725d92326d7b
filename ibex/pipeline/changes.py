"""What has changed in Postgres, as this process hears it, and whether it hears well enough to trust what it remembers.

Postgres' `changes` table is the truth, asked each second; a PUBLISH in Redis after a commit makes it at once. A caller
who is remembered is served while either store would have told of a change (contract section 5).
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from typing import Protocol
from uuid import UUID

from ibex.errors import ServiceDegraded, StoreUnavailable
from ibex.stores.changes import Change, ChangeFeed
from ibex.telemetry import Metrics

log = logging.getLogger("ibex.changes")

POLL_SECONDS = 1.0
TRUST_SECONDS = 5.0
"""How long what was heard is believed, and how old the last answered PING may be."""
REMEMBER_SECONDS = 60.0
"""How long a change is remembered, to judge reads that began before it."""


def now() -> float:
    """Seconds by the clock that also counts while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Subscription(Protocol):
    """What is known of the Redis subscription (`ibex.stores.redis.ChangeSubscription`)."""

    @property
    def unbroken_since(self) -> float | None:
        """When the subscription was confirmed; None while it is broken."""
        ...

    @property
    def last_pong_sent_at(self) -> float | None:
        """The sending time of the last PING that was answered."""
        ...


class ChangeFollower:
    """Follows the change feed for one process.

    Listeners are called with the kind and the id of what changed, or with ("reset", None) when everything remembered
    must be forgotten. They are synchronous: when a poll has returned, its changes are in force here.
    """

    def __init__(
        self, feed: ChangeFeed, subscription: Subscription, metrics: Metrics, *, max_stale_seconds: float
    ) -> None:
        self._feed = feed
        self._subscription = subscription
        self._metrics = metrics
        self._max_stale = max_stale_seconds
        self._listeners: list[Callable[[str, UUID | None], None]] = []
        self._recent: dict[UUID, float] = {}
        self._reset_at = 0.0
        self._heard_at: float | None = None
        self._clock_offset = time.time() - now()
        self._failures = 0
        self._poll: asyncio.Task[bool] | None = None

    def listen(self, listener: Callable[[str, UUID | None], None]) -> None:
        """Call `listener` with each change from now on."""
        self._listeners.append(listener)

    @property
    def postgres_is_away(self) -> bool:
        """Whether the last question went unanswered, and the one before it too or was refused outright."""
        return self._failures >= 2

    def is_current(self) -> bool:
        """Whether a change committed more than five seconds ago would have been heard. Costs two clock reads."""
        offset = time.time() - now()
        if abs(offset - self._clock_offset) > 1.0:
            self._clock_offset = offset
            self._heard_at = None
        return self._heard_at is not None and now() - self._heard_at <= TRUST_SECONDS

    async def ensure_current(self) -> None:
        """Return when what is remembered may be served; raises ServiceDegraded when neither store can be heard."""
        if self.is_current():
            return
        if not self.postgres_is_away:
            for _ in range(2):
                if await asyncio.shield(self._poll_once()) and self.is_current():
                    return
                if self.postgres_is_away:
                    break
        if not self._hears_redis():
            raise ServiceDegraded("ibex cannot hear its stores, so nobody can be let in.", headers={"Retry-After": "1"})

    def _hears_redis(self) -> bool:
        heard, since, pong = self._heard_at, self._subscription.unbroken_since, self._subscription.last_pong_sent_at
        if heard is None or since is None or pong is None:
            return False
        moment = now()
        return since <= heard and moment - pong < TRUST_SECONDS and moment - heard <= self._max_stale

    def changed_since(self, moment: float, ids: Iterable[UUID]) -> bool:
        """Whether any of these changed after `moment` (boot-clock seconds): a read that began then is worth nothing."""
        if moment <= self._reset_at or now() - moment > REMEMBER_SECONDS:
            return True
        return any(self._recent.get(entity, -1.0) >= moment for entity in ids)

    def take(self, kind: str, entity_id: UUID) -> None:
        """Put one change in force: a row of the feed, or a message of the subscription, which may come first."""
        self._recent[entity_id] = now()
        for listener in self._listeners:
            listener(kind, entity_id)

    async def run(self) -> None:
        """Ask each second, for ever."""
        while True:
            began = now()
            await asyncio.shield(self._poll_once())
            self._forget_old()
            await asyncio.sleep(max(0.05, POLL_SECONDS - (now() - began)))

    async def close(self) -> None:
        """Stop asking."""
        if self._poll is not None:
            self._poll.cancel()
        await self._feed.close()

    def _poll_once(self) -> asyncio.Task[bool]:
        """The question under way, else a new one: everybody who waits shares it."""
        if self._poll is None or self._poll.done():
            self._poll = asyncio.get_running_loop().create_task(self._ask(), name="change poll")
        return self._poll

    async def _ask(self) -> bool:
        sent_at = now()
        try:
            changes = await self._feed.poll()
        except StoreUnavailable:
            self._failures += 1
            if self._failures == 2:
                log.warning("postgres does not answer the change feed")
            return False
        if changes.is_standby:
            self._failures += 1
            return False
        if self._failures >= 2:
            log.info("postgres answers the change feed again")
        self._failures = 0
        if changes.is_reset:
            self._reset_at = now()
            for listener in self._listeners:
                listener("reset", None)
        for change in changes.rows:
            self._observe_lag(change)
            self.take(change.kind, change.entity_id)
        self._heard_at = sent_at
        return True

    def _observe_lag(self, change: Change) -> None:
        """From the commit to its effect here, which a message of the subscription may have brought before this row."""
        effect = self._recent.get(change.entity_id, 0.0) + self._clock_offset
        if effect < change.changed_at:
            effect = time.time()
        self._metrics.revocation_lag_seconds.observe(max(0.0, effect - change.changed_at))

    def _forget_old(self) -> None:
        limit = now() - REMEMBER_SECONDS
        self._recent = {entity: moment for entity, moment in self._recent.items() if moment > limit}
