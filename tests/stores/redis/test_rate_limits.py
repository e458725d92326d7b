"""The rate limit's script against a model of it, and what Redis is asked besides."""

import asyncio
import itertools
from collections.abc import Iterator
from importlib.resources import files
from uuid import uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ibex.config import Settings
from ibex.domain.identity import AgentId, OrgId
from ibex.errors import ConfigurationError
from ibex.stores.redis.lane import RedisLane, Script
from ibex.stores.redis.rate_limits import (
    NODES_KEY,
    ScopeState,
    Taken,
    check_eviction_policy,
    count_nodes,
    scope_keys,
)
from tests.valkey import Valkey, open_lane, run_valkey

WINDOW = 60_000
READ_CLOCK = "redis.call('TIME')"
TEXT = files("ibex.stores.redis").joinpath("rate_limit_v1.lua").read_text()


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with run_valkey() as server:
        yield server


class Model:
    """What the script promises, counted the slow way: every grant is kept, every cell counted anew at each call."""

    def __init__(self) -> None:
        self.grants: dict[str, list[tuple[int, int]]] = {}

    def take(self, keys: list[str], limits: list[int], places: int, now: int) -> Taken:
        for key in keys:
            last = max((time for time, _ in self.grants.get(key, [])), default=0)
            if last - now > WINDOW:
                self.grants.pop(key)
            else:
                now = max(now, last)
        cells = {key: self._living(key, now) for key in keys}
        rooms = [limit - sum(count for _, count in cells[key]) for key, limit in zip(keys, limits, strict=True)]
        granted = max(0, min(places, *rooms))
        for key in keys:
            if granted:
                self.grants.setdefault(key, []).append((now, granted))
        states = [self._state(key, limit, now) for key, limit in zip(keys, limits, strict=True)]
        return Taken(granted, now, tuple(states))

    def _living(self, key: str, now: int) -> list[tuple[int, int]]:
        """The cells' leaving times and counts, oldest first; what has left is forgotten."""
        cells: dict[int, list[tuple[int, int]]] = {}
        for time, count in self.grants.get(key, []):
            cells.setdefault(time // 1000, []).append((time, count))
        living = [cell for cell in cells.values() if max(time for time, _ in cell) + WINDOW > now]
        self.grants[key] = [grant for cell in living for grant in cell]
        return sorted((max(time for time, _ in cell) + WINDOW, sum(count for _, count in cell)) for cell in living)

    def _state(self, key: str, limit: int, now: int) -> ScopeState:
        cells = self._living(key, now)
        left = held = sum(count for _, count in cells)
        next_free = now
        for leaves_at, count in cells:
            left, next_free = left - count, leaves_at
            if left < limit:
                break
        return ScopeState(limit, max(0, limit - held), next_free)


STEPS = st.one_of(
    st.integers(0, 40),
    st.integers(0, 1500),
    st.sampled_from([999, 1000, 1001]),
    st.integers(58_500, 61_500),
    st.sampled_from([59_999, 60_000, 60_001, 61_000]),
    st.integers(-59_000, -1),
    st.integers(-70_000, -59_900),
    st.just(200_000),
)
CALLS = st.tuples(STEPS, st.integers(1, 4), st.sampled_from(["", "a", "b"]), st.integers(0, 6), st.integers(1, 4))
"""Milliseconds since the last call, places asked for, which agent's limit (or none), the two limits."""

numbers = itertools.count()


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as one:
        yield one


@pytest.fixture(scope="module")
def lane(valkey: Valkey, runner: asyncio.Runner) -> Iterator[RedisLane]:
    lane = RedisLane(valkey.url, deadline=5)
    runner.run(lane.connect())
    yield lane
    runner.run(lane.close())


@pytest.fixture(scope="module")
def timed_script() -> Script:
    """The script with the clock as its last two arguments; nothing else differs."""
    assert TEXT.count(READ_CLOCK) == 1
    return Script(TEXT.replace(READ_CLOCK, "{ARGV[#ARGV - 1], ARGV[#ARGV]}"))


@settings(max_examples=400, deadline=None)
@given(st.lists(CALLS, min_size=1, max_size=40))
def test_nested_scopes_lowered_limits_and_clock_steps_are_counted_as_the_model_counts(
    lane: RedisLane, runner: asyncio.Runner, timed_script: Script, calls: list[tuple[int, int, str, int, int]]
) -> None:
    model, org, now = Model(), f"org{next(numbers)}", 1_700_000_000_300
    history: dict[str, list[tuple[int, int]]] = {}
    for step, places, agent, org_limit, agent_limit in calls:
        now += step
        keys = [org, f"{org}:{agent}"] if agent else [org]
        limits = [org_limit, agent_limit][: len(keys)]
        clock = (now // 1000, now % 1000 * 1000 + 999)
        granted, counted_at, *state = runner.run(timed_script.run(lane, tuple(keys), (places, *limits, *clock)))
        states = tuple(ScopeState(*state[at : at + 3]) for at in range(0, len(state), 3))
        expected = model.take(keys, limits, places, now)
        assert Taken(granted, counted_at, states) == expected
        for key, limit in zip(keys, limits, strict=True):
            history[key] = grants = remember(history.get(key, []), counted_at, granted)
            assert not granted or sum(count for _, count in grants) <= limit, "more than the limit in a minute"


def remember(grants: list[tuple[int, int]], now: int, granted: int) -> list[tuple[int, int]]:
    """A scope's grants of the minute up to now, all of them forgotten when the clock went back by more than that."""
    if grants and grants[-1][0] > now:
        grants = []
    minute = [(time, count) for time, count in grants if time > now - WINDOW]
    return [*minute, (now, granted)] if granted else minute


@pytest.mark.parametrize("offset", [0, 1, 500, 998, 999])
async def test_a_place_frees_after_a_minute_and_at_most_a_second_late(
    valkey: Valkey, timed_script: Script, offset: int
) -> None:
    """Two requests of one second: both places are held until the later one's minute is over."""
    start = 1_700_000_000_000
    async with open_lane(valkey.url) as lane:

        async def take(now: int) -> int:
            clock = (now // 1000, now % 1000 * 1000)
            granted, *_ = await timed_script.run(lane, (f"late{offset}",), (1, 2, *clock))
            return int(granted)

        assert [await take(start), await take(start + offset), await take(start + offset)] == [1, 1, 0]
        assert await take(start + offset + WINDOW - 1) == 0
        assert [await take(start + offset + WINDOW) for _ in range(3)] == [1, 1, 0]


async def test_keys_carry_the_organization_and_expire(valkey: Valkey) -> None:
    org_id, agent_id = OrgId(uuid4()), AgentId(uuid4())
    keys = scope_keys(org_id, agent_id)
    assert keys == (f"ibex:rate:{{{org_id}}}".encode(), f"ibex:rate:{{{org_id}}}:{agent_id}".encode())
    assert scope_keys(org_id, None) == keys[:1]
    async with open_lane(valkey.url) as lane:
        await Script(TEXT).run(lane, keys, (1, 60, 5))
        for key in keys:
            assert 60_000 < await lane.call("PTTL", key) <= 61_000


async def test_a_full_minute_of_cells_stays_a_compact_hash(valkey: Valkey, timed_script: Script) -> None:
    async with open_lane(valkey.url) as lane:
        for second in range(61):
            time = 1_700_000_000 + second
            await timed_script.run(lane, ("compact",), (1, 1000, time, 900_000 - second * 10_000))
        assert await lane.call("HGET", "compact", "held") == b"61"
        assert await lane.call("OBJECT", "ENCODING", "compact") == b"listpack"


async def test_nodes_are_counted_for_a_minute_after_their_last_beat(valkey: Valkey) -> None:
    async with open_lane(valkey.url) as lane:
        assert await count_nodes(lane, "one") == 1
        assert await count_nodes(lane, "one") == 1
        assert await count_nodes(lane, "two") == 2
        await lane.call("ZINCRBY", NODES_KEY, -61, "one")
        assert await count_nodes(lane, "two") == 1
        assert await lane.call("TTL", NODES_KEY) > 60


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-lru", "volatile-ttl"])
async def test_a_policy_that_could_forget_limits_is_refused_outside_development(valkey: Valkey, policy: str) -> None:
    production = Settings(env="production", llm_mode="live")
    async with open_lane(valkey.url) as lane:
        assert await check_eviction_policy(lane, production) == "noeviction"
        await lane.call("CONFIG", "SET", "maxmemory-policy", policy)
        try:
            assert await check_eviction_policy(lane, Settings()) == policy
            with pytest.raises(ConfigurationError, match=policy):
                await check_eviction_policy(lane, production)
        finally:
            await lane.call("CONFIG", "SET", "maxmemory-policy", "noeviction")


async def test_a_policy_that_may_not_be_asked_for_is_unknown(valkey: Valkey) -> None:
    async with open_lane(valkey.url) as lane:
        await lane.call("ACL", "SETUSER", "plain", "on", "nopass", "~*", "+@all", "-info")
    async with open_lane(f"unix://plain:x@{valkey.path}") as lane:
        assert await check_eviction_policy(lane, Settings(env="production", llm_mode="live")) is None
