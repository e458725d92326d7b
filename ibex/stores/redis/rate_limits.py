"""Places in the rate limits' sliding windows, counted in Redis for all processes and nodes alike."""

from collections.abc import Callable
from functools import lru_cache, partial
from importlib.resources import files
from typing import Any, NamedTuple

from ibex.config import Settings
from ibex.domain.identity import AgentId, OrgId
from ibex.errors import ConfigurationError, StoreError, StoreRefused
from ibex.stores.redis.lane import RedisLane, Script

NODES_KEY = "ibex:nodes"
NODE_SECONDS = 60
"""How long a node counts as there after its last beat."""
BEAT_DEADLINE = 1.0
"""Seconds a call off the hot path waits."""


class ScopeState(NamedTuple):
    """One scope's window after a call."""

    limit: int
    remaining: int
    next_free_ms: int
    """When the next place frees (Unix ms); now, when none is held."""


class Taken(NamedTuple):
    """What a call got: the first `granted` of the places it asked for, in all scopes or in none."""

    granted: int
    now_ms: int
    """The clock that counted (Unix ms)."""
    scopes: tuple[ScopeState, ...]
    """The organization first, then the agent if it has a limit."""


@lru_cache(maxsize=20_000)
def scope_keys(org_id: OrgId, agent_id: AgentId | None) -> tuple[bytes, ...]:
    """The Redis keys of an organization's scope and, unless it has no limit, an agent's. One hash tag, so one slot."""
    org = f"ibex:rate:{{{org_id}}}"
    return (org.encode(),) if agent_id is None else (org.encode(), f"{org}:{agent_id}".encode())


class RateLimitStore:
    """The windows in Redis."""

    def __init__(self, lane: RedisLane) -> None:
        self._lane = lane
        self._script = Script(files("ibex.stores.redis").joinpath("rate_limit_v1.lua").read_text())

    def take(
        self,
        on_taken: Callable[[Taken | StoreError], None],
        keys: tuple[bytes, ...],
        limits: tuple[int, ...],
        places: int,
    ) -> None:
        """Queue a call for so many places in these scopes. `flush` sends what is queued; then comes `on_taken`."""
        self._script.send(self._lane, partial(_read, on_taken), keys, (places, *limits))

    def flush(self) -> None:
        """Send all calls of this tick in one write."""
        self._lane.flush()


def _read(on_taken: Callable[[Taken | StoreError], None], reply: Any) -> None:
    if isinstance(reply, StoreError):
        on_taken(reply)
        return
    granted, now_ms, *numbers = reply
    scopes = tuple(ScopeState(*numbers[at : at + 3]) for at in range(0, len(numbers), 3))
    on_taken(Taken(granted, now_ms, scopes))


async def count_nodes(lane: RedisLane, node_id: str) -> int:
    """Say that this node is there, and count the nodes that said so in the last minute; raises StoreError.

    Redis' clock decides, as nodes' clocks differ.
    """
    seconds, _ = await lane.call("TIME", deadline=BEAT_DEADLINE)
    now = int(seconds)
    await lane.call("ZADD", NODES_KEY, now, node_id, deadline=BEAT_DEADLINE)
    await lane.call("ZREMRANGEBYSCORE", NODES_KEY, "-inf", f"({now - NODE_SECONDS}", deadline=BEAT_DEADLINE)
    await lane.call("EXPIRE", NODES_KEY, 2 * NODE_SECONDS, deadline=BEAT_DEADLINE)
    return max(1, int(await lane.call("ZCARD", NODES_KEY, deadline=BEAT_DEADLINE)))


async def check_eviction_policy(lane: RedisLane, settings: Settings) -> str | None:
    """What Redis does when its memory is full; None when it does not let us ask. Raises StoreUnavailable.

    Windows and idempotency keys all expire, so the `volatile-…` policies evict them just as `allkeys-…` do: only
    `noeviction` never forgets a limit. Another policy raises ConfigurationError outside development.
    """
    try:
        memory = await lane.call("INFO", "memory", deadline=BEAT_DEADLINE)
    except StoreRefused:
        return None
    lines = bytes(memory).decode().splitlines()
    policy = next((line.partition(":")[2] for line in lines if line.startswith("maxmemory_policy:")), None)
    if policy not in {None, "noeviction"} and not settings.is_development:
        raise ConfigurationError(
            f"Redis evicts keys when its memory is full ({policy}), and with them the rate limits' counts.",
            hint="Set `maxmemory-policy noeviction` on the Redis that IBEX_REDIS_URL names.",
        )
    return policy
