"""The rate limit: requests a minute of an organization and of an agent, before anything costs."""

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from hashlib import sha256
from math import ceil
from typing import Literal, NamedTuple, NoReturn

from ibex.config import Settings
from ibex.domain.identity import AgentId, OrgId, Principal
from ibex.errors import RateLimited, ServiceDegraded, StoreError
from ibex.pipeline.breaker import Breaker
from ibex.pipeline.local_window import LocalWindows
from ibex.stores.redis.lane import RedisLane
from ibex.stores.redis.rate_limits import RateLimitStore, ScopeState, Taken, count_nodes, scope_keys
from ibex.telemetry import Metrics

log = logging.getLogger("ibex.rate_limiting")

BEAT_SECONDS = 5.0
"""How often a node says that it is there."""
BEATS_BELIEVED = 12
"""Answered beats whose greatest count is believed, a minute's: a Redis that was emptied has yet to hear of all."""

ScopeName = Literal["org", "agent"]
_SCOPE_NAMES: tuple[ScopeName, ...] = ("org", "agent")
_OWNERS = {"org": "organization", "agent": "agent"}


class Admission(NamedTuple):
    """A place in every scope, and how the tightest of them stands."""

    limit: int
    """Requests a minute."""
    remaining: int
    reset_at: int
    """When the next place frees (Unix s, rounded up)."""

    @property
    def headers(self) -> dict[str, str]:
        """The X-RateLimit headers of the response."""
        return {
            "X-RateLimit-Limit": str(self.limit),
            "X-RateLimit-Remaining": str(self.remaining),
            "X-RateLimit-Reset": str(self.reset_at),
        }


class _Demand(NamedTuple):
    """What requests must have in common to share one call."""

    org_id: OrgId
    agent_id: AgentId | None
    """None: the agent has no limit of its own."""
    limits: tuple[int, ...]


_Place = tuple[Taken, int]
"""The answer to a shared call, and which of its requests one is, in order of arrival."""
_Waiting = list["asyncio.Future[_Place | None]"]
"""The requests of one call; None tells them that nobody can count them."""


class RateLimiter:
    """Counts requests in Redis and, while Redis is away, in this process with its share of each limit.

    All requests of an event-loop tick go to Redis in one write, those with the same scopes in one call. A switch
    between Redis and this process starts a new minute: neither knows what the other counted.
    """

    def __init__(self, lane: RedisLane, settings: Settings, metrics: Metrics, *, node_id: str | None = None) -> None:
        self._lane = lane
        self._store = RateLimitStore(lane)
        self._default_rpm = settings.rate_limit_rpm
        self._refuses_on_outage = settings.rate_limit_on_outage == "refuse"
        self._workers = settings.workers
        self._node_id = node_id or name_node(settings)
        self._node_counts = deque([1], maxlen=BEATS_BELIEVED)
        self._breaker = Breaker()
        self._local = LocalWindows()
        self._demands: dict[_Demand, _Waiting] = {}
        self._redis_errors = metrics.rate_limit_redis_errors_total.labels()
        self._redis_away = metrics.store_away.labels("redis")
        verdicts = metrics.rate_limited_total
        self._allowed = {scope: verdicts.labels("allowed", scope) for scope in _SCOPE_NAMES}
        self._denied = {scope: verdicts.labels("denied", scope) for scope in _SCOPE_NAMES}

    @property
    def is_local(self) -> bool:
        """Whether limits are counted by this process alone, because Redis is away."""
        return self._breaker.is_open

    @property
    def seen_nodes(self) -> int:
        """How many nodes share the limits, as far as was seen in the last minute of a Redis that answered."""
        return max(self._node_counts)

    async def admit(self, principal: Principal) -> Admission:
        """Take a place in every scope of the caller; raises RateLimited, with its headers, when one is full.

        Raises ServiceDegraded when Redis is away and the settings say to refuse then.
        """
        org_rpm, agent_rpm = principal.org_rpm, principal.agent_rpm
        if org_rpm is None:
            org_rpm = self._default_rpm
        if agent_rpm is None:
            demand = _Demand(principal.org_id, None, (org_rpm,))
        else:
            demand = _Demand(principal.org_id, principal.agent_id, (org_rpm, agent_rpm))
        loop = asyncio.get_running_loop()
        place: asyncio.Future[_Place | None] = loop.create_future()
        if not self._demands:
            loop.call_soon(self._send)
        waiting = self._demands.get(demand)
        if waiting is None:
            self._demands[demand] = [place]
        else:
            waiting.append(place)
        return self._judge(await place)

    async def run(self) -> NoReturn:
        """Tell Redis every 5 s that this node is there, and learn how many share the limits."""
        while True:
            await self.beat()
            await asyncio.sleep(BEAT_SECONDS)

    async def beat(self) -> None:
        """Tell Redis once that this node is there; while Redis is away, the nodes last seen are the best guess."""
        with suppress(StoreError):
            self._node_counts.append(await count_nodes(self._lane, self._node_id))

    def _send(self) -> None:
        demands, self._demands = self._demands, {}
        for demand, waiting in demands.items():
            if self._breaker.admits_call():
                keys = scope_keys(demand.org_id, demand.agent_id)
                self._store.take(partial(self._settle, demand, waiting), keys, demand.limits, len(waiting))
            else:
                self._settle_here(demand, waiting)
        self._store.flush()

    def _settle(self, demand: _Demand, waiting: _Waiting, answer: Taken | StoreError) -> None:
        if isinstance(answer, StoreError):
            self._redis_errors.inc()
            if self._breaker.record_failure():
                self._redis_away.set(1)
                log.warning("rate limits are no longer counted in redis", extra={"reason": answer.message})
            self._settle_here(demand, waiting)
            return
        if self._breaker.record_success():
            self._local.clear()
            self._redis_away.set(0)
            log.info("rate limits are counted in redis again")
        _hand_out(waiting, answer)

    def _settle_here(self, demand: _Demand, waiting: _Waiting) -> None:
        if self._refuses_on_outage:
            _hand_out(waiting, None)
            return
        share = self._workers * self.seen_nodes
        shares = [max(1, limit // share) if limit else 0 for limit in demand.limits]
        keys = scope_keys(demand.org_id, demand.agent_id)
        _hand_out(waiting, self._local.take(keys, shares, demand.limits, len(waiting)))

    def _judge(self, place: _Place | None) -> Admission:
        if place is None:
            raise ServiceDegraded("The rate limit cannot be checked just now. Try again shortly.")
        taken, index = place
        if index >= taken.granted:
            raise self._refuse(taken)
        name, tightest = _find_tightest(taken.scopes)
        self._allowed[name].inc()
        # the answer stands as it is after the last request of the call; those before it saw more room
        remaining = tightest.remaining + taken.granted - 1 - index
        return Admission(tightest.limit, remaining, ceil(tightest.next_free_ms / 1000))

    def _refuse(self, taken: Taken) -> RateLimited:
        full = [(scope.next_free_ms, place) for place, scope in enumerate(taken.scopes) if scope.remaining == 0]
        next_free_ms, place = max(full)
        name, limit = _SCOPE_NAMES[place], taken.scopes[place].limit
        self._denied[name].inc()
        wait = min(60, max(1, ceil((next_free_ms - taken.now_ms) / 1000)))
        return RateLimited(
            f"The {_OWNERS[name]}'s limit of {limit} requests a minute is used up. Try again in {wait} s.",
            headers={"Retry-After": str(wait)} | Admission(limit, 0, ceil(next_free_ms / 1000)).headers,
        )


def _hand_out(waiting: _Waiting, answer: Taken | None) -> None:
    for index, place in enumerate(waiting):
        if not place.done():
            place.set_result(None if answer is None else (answer, index))


def _find_tightest(scopes: Sequence[ScopeState]) -> tuple[ScopeName, ScopeState]:
    """The scope with the least places left; among equals the one that frees a place later."""
    place = min(range(len(scopes)), key=lambda at: (scopes[at].remaining, -scopes[at].next_free_ms))
    return _SCOPE_NAMES[place], scopes[place]


def name_node(settings: Settings) -> str:
    """A name that all workers of a node share and no other node has: its host and its data directory."""
    place = f"{socket.gethostname()}:{settings.data_dir.resolve()}"
    if settings.data_dir.exists():
        # two containers may have the same host name and path, but not the same directory
        status = settings.data_dir.stat()
        place += f":{status.st_dev}:{status.st_ino}"
    return sha256(place.encode()).hexdigest()[:16]
