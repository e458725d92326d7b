"""What has changed in Postgres, as this process hears it, and whether it hears well enough to trust what it remembers.

Postgres' `changes` table is the truth, asked each second; a PUBLISH in Redis after a commit makes it at once. A caller
who is remembered is served while either store would have told of a change (contract section 5).
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from math import inf
from typing import NoReturn, Protocol
from uuid import UUID

from ibex.errors import ServiceDegraded, StoreError
from ibex.pipeline.single_flight import SingleFlight
from ibex.stores.postgres.changes import Change, ChangeFeed, Changes
from ibex.stores.redis.subscription import boot_time
from ibex.telemetry import Metrics

log = logging.getLogger("ibex.changes")

POLL_SECONDS = 1.0
AWAY_SECONDS = 0.25
"""The same while an answer is missed: Postgres is not to be believed away for longer than it is."""
LONGEST_WAIT = 1.0
"""How long a request waits for one more answer of Postgres."""
TRUST_SECONDS = 5.0
"""How long what was heard is believed, and how old the last answered PING may be."""
REMEMBER_SECONDS = 60.0
"""How long a change is remembered, to judge reads that began before it."""
MOST_REMEMBERED = 100_000
"""Changes remembered; beyond that everything counts as changed."""
STEP_SECONDS = 1.0
"""A wall clock that moves by more against the boot clock was set, or this machine stood still without knowing it."""

Listener = Callable[[str, UUID | None], None]

now = boot_time
"""Seconds by the clock that also counts while the machine is suspended; the subscription stamps its PINGs by it too."""


class Subscription(Protocol):
    """What is known of the Redis subscription (`ibex.stores.redis.subscription.ChangeSubscription`)."""

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
    may be wrong. They are synchronous: when a poll has returned, its changes are in force here.
    """

    def __init__(
        self, feed: ChangeFeed, subscription: Subscription, metrics: Metrics, *, max_stale_seconds: float
    ) -> None:
        self._feed = feed
        self._subscription = subscription
        self._metrics = metrics
        self._max_stale = max_stale_seconds
        self._listeners: list[Listener] = []
        self._recent: dict[UUID, float] = {}
        """What changed in the last minute, and when it was heard; oldest first."""
        self._reset_at = -inf
        self._heard_at = -inf
        """The sending time of the last question that was answered; -inf: never."""
        self._missed_at = -inf
        """When a question was last seen to go without an answer."""
        self._clock_offset = time.time() - now()
        self._clock_steps = 0
        self._timeouts = 0
        self._is_away = False
        self._polls: SingleFlight[None, None] = SingleFlight("change poll")

    def listen(self, listener: Listener) -> None:
        """Call `listener` with each change from now on."""
        self._listeners.append(listener)

    @property
    def postgres_is_away(self) -> bool:
        """Whether the last question was refused or cut off, or the last two went unanswered."""
        return self._is_away

    def is_current(self, moment: float) -> bool:
        """Whether a change committed more than five seconds ago would have been heard. `moment` is `now()`, just read.

        A step of the wall clock makes everything remembered doubtful, at once.
        """
        if abs(time.time() - moment - self._clock_offset) > STEP_SECONDS:
            self._take_clock_step()
        return moment - self._heard_at <= TRUST_SECONDS

    async def catch_up(self) -> bool:
        """Whether what is remembered is current, after waiting up to a second for Postgres unless it is away."""
        if self.is_current(now()):
            return True
        try:
            async with asyncio.timeout(LONGEST_WAIT):
                while not self.is_current(now()) and not self._is_away:
                    await self._polls.run(None, self._ask)
        except TimeoutError:
            return False
        return self.is_current(now())

    async def ensure_current(self) -> None:
        """Return when what is remembered may be served; raises ServiceDegraded when neither store can be heard."""
        was_away = self._is_away
        if await self.catch_up() or self._hears_redis():
            return
        if not (was_away and await self._is_back()):
            raise ServiceDegraded("ibex cannot hear its stores, so nobody can be let in.", headers={"Retry-After": "1"})

    def changed_since(self, moment: float, ids: Iterable[UUID]) -> bool:
        """Whether any of these changed after `moment` (boot-clock seconds): a read that began then is worth nothing."""
        if moment <= self._reset_at or now() - moment > REMEMBER_SECONDS:
            return True
        return any(self._recent.get(entity, -inf) >= moment for entity in ids)

    def take(self, kind: str, entity_id: UUID) -> None:
        """Put one change in force: a row of the feed, or a message of the subscription, which may come first."""
        self._recent.pop(entity_id, None)
        self._recent[entity_id] = now()
        for listener in self._listeners:
            listener(kind, entity_id)
        if len(self._recent) > MOST_REMEMBERED:
            self._reset()

    async def run(self) -> NoReturn:
        """Ask each second, and sooner where an answer is missed, for ever."""
        while True:
            began = now()
            await self._polls.run(None, self._ask)
            self._forget_old()
            await self._rest(began + POLL_SECONDS)

    async def close(self) -> None:
        """Stop asking."""
        await self._polls.close()
        await self._feed.close()

    async def _rest(self, until: float) -> None:
        """Wait for the next question, though not long while Postgres is away or has not answered since Redis is heard.

        What Redis tells is of use only since an answer of Postgres (`_hears_redis`).
        """
        while True:
            await asyncio.sleep(max(0.05, min(AWAY_SECONDS, until - now())))
            since = self._subscription.unbroken_since
            if self._is_away or (since is not None and since > self._heard_at) or now() >= until:
                return

    async def _is_back(self) -> bool:
        """Whether Postgres answers one more question, which all who wait share: it may be back since the last one."""
        if now() - self._missed_at < AWAY_SECONDS:
            return False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LONGEST_WAIT):
                await self._polls.run(None, self._ask)
        return self.is_current(now())

    def _hears_redis(self) -> bool:
        heard, since, pong = self._heard_at, self._subscription.unbroken_since, self._subscription.last_pong_sent_at
        if since is None or pong is None:
            return False
        moment = now()
        return since <= heard and moment - pong < TRUST_SECONDS and moment - heard <= self._max_stale

    async def _ask(self) -> None:
        sent_at, steps = now(), self._clock_steps
        try:
            changes = await self._feed.poll()
        except StoreError as error:
            self._miss(error.message, is_timeout=isinstance(error.__cause__, TimeoutError))
        except Exception as error:  # a fault of the feed's must not end the questions: then nobody would be let in
            log.error("the change feed failed", exc_info=error)
            self._miss(type(error).__name__)
        else:
            if changes.is_standby:
                self._miss("The server that answered is in recovery.")
            else:
                self._hear(changes)
                self._follow_clock()
                # An answer from before a step may be as old as the pause that the step reveals.
                if steps == self._clock_steps:
                    self._heard_at = sent_at

    def _hear(self, changes: Changes) -> None:
        self._timeouts = 0
        self._metrics.change_polls_total.labels("ok").inc()
        self._metrics.store_away.labels("postgres").set(0)
        if self._is_away:
            self._is_away = False
            log.info("postgres answers the change feed again")
        if changes.is_reset:
            if self._heard_at > -inf:
                log.warning("postgres has another history than before, so what is remembered is read again")
            self._reset()
        for change in changes.rows:
            self._observe_lag(change)
            self.take(change.kind, change.entity_id)

    def _miss(self, reason: str, *, is_timeout: bool = False) -> None:
        self._missed_at = now()
        self._timeouts += is_timeout
        self._metrics.change_polls_total.labels("failed").inc()
        if not self._is_away and (not is_timeout or self._timeouts >= 2):
            self._is_away = True
            self._metrics.store_away.labels("postgres").set(1)
            log.warning("postgres does not answer the change feed", extra={"reason": reason})

    def _reset(self) -> None:
        self._recent.clear()
        self._reset_at = now()
        for listener in self._listeners:
            listener("reset", None)

    def _follow_clock(self) -> None:
        """Let the wall clock drift, as long as it does so slowly."""
        offset = time.time() - now()
        if abs(offset - self._clock_offset) > STEP_SECONDS:
            self._take_clock_step()
        self._clock_offset = offset

    def _take_clock_step(self) -> None:
        self._clock_offset = time.time() - now()
        self._clock_steps += 1
        self._heard_at = -inf
        log.warning("the wall clock was stepped, so what is remembered is read again")
        self._reset()

    def _observe_lag(self, change: Change) -> None:
        """From the commit to its effect here, which a message of the subscription may have brought before this row."""
        effect = self._recent.get(change.entity_id, 0.0) + self._clock_offset
        if effect < change.changed_at:
            effect = time.time()
        self._metrics.revocation_lag_seconds.observe(max(0.0, effect - change.changed_at))

    def _forget_old(self) -> None:
        limit = now() - REMEMBER_SECONDS
        while self._recent:
            oldest = next(iter(self._recent))
            if self._recent[oldest] > limit:
                return
            del self._recent[oldest]
