"""The rate limit as a request meets it: headers, nested scopes, many at once, and Redis going away and coming back."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from uuid import uuid4

import pytest

from ibex.config import Settings
from ibex.domain.identity import PROXY_CHAT, AgentId, OrgId, Principal, TokenId, UserId
from ibex.errors import RateLimited, ServiceDegraded
from ibex.pipeline.breaker import Breaker
from ibex.pipeline.local_window import LocalWindows
from ibex.pipeline.rate_limiting import BEATS_BELIEVED, Admission, RateLimiter, name_node
from ibex.telemetry import Metrics
from tests.valkey import Valkey, open_lane, run_valkey


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with run_valkey() as server:
        yield server


def make_principal(org_rpm: int | None = None, agent_rpm: int | None = None) -> Principal:
    return Principal(
        token_id=TokenId(uuid4()),
        org_id=OrgId(uuid4()),
        user_id=UserId(uuid4()),
        agent_id=AgentId(uuid4()),
        permissions=PROXY_CHAT,
        org_rpm=org_rpm,
        agent_rpm=agent_rpm,
    )


@asynccontextmanager
async def open_limiter(
    url: str, *, deadline: float = 1.0, metrics: Metrics | None = None, **values: object
) -> AsyncIterator[RateLimiter]:
    settings = Settings.model_validate(values)
    async with open_lane(url, deadline=deadline) as lane:
        yield RateLimiter(lane, settings, metrics or Metrics())


async def admit_many(limiter: RateLimiter, principal: Principal, count: int) -> list[Admission | RateLimited]:
    """So many requests in one tick; each one's fate, in order of arrival."""
    fates = await asyncio.gather(*(limiter.admit(principal) for _ in range(count)), return_exceptions=True)
    assert all(isinstance(fate, Admission | RateLimited) for fate in fates), fates
    return fates  # type: ignore[return-value]


def count_admitted(fates: list[Admission | RateLimited]) -> int:
    return sum(isinstance(fate, Admission) for fate in fates)


async def test_each_request_sees_one_place_less(valkey: Valkey) -> None:
    async with open_limiter(valkey.url) as limiter:
        principal = make_principal()
        one_by_one = [await limiter.admit(principal) for _ in range(3)]
        at_once = await admit_many(limiter, principal, 3)
    remaining = [admission.remaining for admission in (*one_by_one, *at_once)]  # type: ignore[union-attr]
    assert remaining == [59, 58, 57, 56, 55, 54]
    assert {admission.limit for admission in one_by_one} == {60}
    assert one_by_one[0].headers == {
        "X-RateLimit-Limit": "60",
        "X-RateLimit-Remaining": "59",
        "X-RateLimit-Reset": str(one_by_one[0].reset_at),
    }
    assert 0 <= one_by_one[0].reset_at - time.time() <= 61


async def test_the_first_to_arrive_pass_and_the_rest_are_told_when_to_come_back(valkey: Valkey) -> None:
    metrics = Metrics()
    async with open_limiter(valkey.url, metrics=metrics) as limiter:
        fates = await admit_many(limiter, make_principal(), 63)
    assert [isinstance(fate, Admission) for fate in fates] == [True] * 60 + [False] * 3
    refused = fates[-1]
    assert isinstance(refused, RateLimited)
    assert refused.message == "The organization's limit of 60 requests a minute is used up. Try again in 60 s."
    assert refused.headers["Retry-After"] == "60"
    assert refused.headers["X-RateLimit-Limit"] == "60"
    assert refused.headers["X-RateLimit-Remaining"] == "0"
    assert 0 < int(refused.headers["X-RateLimit-Reset"]) - time.time() <= 61
    assert metrics.rate_limited_total.labels("allowed", "org").value == 60
    assert metrics.rate_limited_total.labels("denied", "org").value == 3


async def test_the_tightest_scope_is_shown_and_a_refused_request_takes_no_place(valkey: Valkey) -> None:
    metrics = Metrics()
    async with open_limiter(valkey.url, metrics=metrics) as limiter:
        busy = make_principal(10, 3)
        quiet = replace(busy, agent_id=AgentId(uuid4()), agent_rpm=100)
        fates = await admit_many(limiter, busy, 8)
        assert [fate.remaining for fate in fates[:3]] == [2, 1, 0]  # type: ignore[union-attr]
        assert count_admitted(fates) == 3
        assert isinstance(fates[3], RateLimited)
        assert fates[3].message.startswith("The agent's limit of 3 ")
        assert fates[3].headers["X-RateLimit-Limit"] == "3"
        admission = await limiter.admit(quiet)
        assert admission[:2] == (10, 6)
    assert metrics.rate_limited_total.labels("denied", "agent").value == 5
    assert metrics.rate_limited_total.labels("allowed", "agent").value == 3
    assert metrics.rate_limited_total.labels("allowed", "org").value == 1


async def test_a_lowered_limit_is_in_force_at_the_next_request(valkey: Valkey) -> None:
    async with open_limiter(valkey.url) as limiter:
        principal = make_principal(10)
        await admit_many(limiter, principal, 5)
        with pytest.raises(RateLimited) as refused:
            await limiter.admit(replace(principal, org_rpm=5))
        assert refused.value.headers["X-RateLimit-Limit"] == "5"
        assert (await limiter.admit(principal)).remaining == 4


async def test_one_organization_does_not_use_up_anothers(valkey: Valkey) -> None:
    async with open_limiter(valkey.url) as limiter:
        loud, other = make_principal(2), make_principal(2)
        fates, admission = await asyncio.gather(admit_many(limiter, loud, 5), limiter.admit(other))
        assert count_admitted(fates) == 2
        assert admission.remaining == 1


async def test_the_limit_is_exact_across_workers(valkey: Valkey) -> None:
    principal = make_principal(100, 70)
    async with open_limiter(valkey.url) as one, open_limiter(valkey.url) as two:

        async def ask(limiter: RateLimiter) -> int:
            admitted = 0
            for _ in range(20):
                admitted += count_admitted(await admit_many(limiter, principal, 3))
            return admitted

        assert sum(await asyncio.gather(ask(one), ask(two))) == 70


async def test_requests_of_a_tick_share_a_call(valkey: Valkey) -> None:
    async with open_limiter(valkey.url) as limiter, open_lane(valkey.url) as control:
        principal = make_principal(1000)
        await limiter.admit(principal)
        await control.call("CONFIG", "RESETSTAT")
        await admit_many(limiter, principal, 50)
        statistics = bytes(await control.call("INFO", "commandstats")).decode()
        assert "cmdstat_evalsha:calls=1," in statistics


async def test_a_client_that_leaves_does_not_disturb_the_others_of_its_call(valkey: Valkey) -> None:
    async with open_limiter(valkey.url) as limiter:
        principal = make_principal()
        async with asyncio.TaskGroup() as group:
            calls = [group.create_task(limiter.admit(principal)) for _ in range(3)]
            await asyncio.sleep(0)
            calls[1].cancel()
        assert calls[0].result().remaining == 59
        assert calls[2].result().remaining == 57


async def test_limits_hold_while_redis_is_frozen_and_are_shared_again_after(
    valkey: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Metrics()
    caplog.set_level("INFO", logger="ibex.rate_limiting")
    async with open_limiter(valkey.url, deadline=0.2, metrics=metrics, workers=2) as limiter:
        principal = make_principal(40)
        await limiter.admit(principal)
        with valkey.frozen():
            fates: list[Admission | RateLimited] = []
            for _ in range(30):
                fates += await admit_many(limiter, principal, 2)
            assert limiter.is_local
            assert count_admitted(fates) == 20
            assert [fate.remaining for fate in fates[:3]] == [19, 18, 17]  # type: ignore[union-attr]
            refused = fates[-1]
            assert isinstance(refused, RateLimited)
            assert refused.headers["X-RateLimit-Limit"] == "40"
            assert 1 <= int(refused.headers["Retry-After"]) <= 60
            assert metrics.rate_limit_redis_errors_total.labels().value >= 3
            assert metrics.store_away.labels("redis").value == 1
        await recover(limiter)
        assert metrics.store_away.labels("redis").value == 0
        assert (await limiter.admit(make_principal())).remaining == 59
        messages = [record.getMessage() for record in caplog.records if record.name == "ibex.rate_limiting"]
    assert messages == ["rate limits are no longer counted in redis", "rate limits are counted in redis again"]


async def recover(limiter: RateLimiter) -> None:
    """Ask until a probe has found Redis again."""
    async with asyncio.timeout(20):
        while limiter.is_local:
            await limiter.admit(make_principal())
            await asyncio.sleep(0.02)


async def test_an_outage_starts_a_new_minute() -> None:
    with run_valkey() as server:
        async with open_limiter(server.url, workers=1) as limiter:
            principal = make_principal(5)
            for _ in range(2):
                assert count_admitted(await admit_many(limiter, principal, 7)) == 5
                server.stop()
                assert count_admitted(await admit_many(limiter, principal, 7)) == 5
                await admit_many(limiter, make_principal(), 1)
                await admit_many(limiter, make_principal(), 1)
                assert limiter.is_local
                server.start()
                await recover(limiter)


async def test_an_outage_refuses_where_the_settings_say_so() -> None:
    with run_valkey() as server:
        async with open_limiter(server.url, rate_limit_on_outage="refuse") as limiter:
            await limiter.admit(make_principal())
            server.stop()
            for _ in range(5):
                with pytest.raises(ServiceDegraded):
                    await limiter.admit(make_principal())


async def test_while_redis_is_away_a_node_counts_with_its_share() -> None:
    with run_valkey() as server:
        async with open_lane(server.url) as lane:
            limiters = [RateLimiter(lane, Settings(workers=3), Metrics(), node_id=f"node {n}") for n in range(2)]
            for limiter in limiters:
                await limiter.beat()
            await limiters[0].beat()
            server.stop()
            assert count_admitted(await admit_many(limiters[0], make_principal(60), 60)) == 10
            assert count_admitted(await admit_many(limiters[0], make_principal(2), 60)) == 1
            await limiters[0].beat()
            assert count_admitted(await admit_many(limiters[0], make_principal(60), 60)) == 10


async def test_a_redis_that_was_emptied_does_not_leave_a_node_alone(valkey: Valkey) -> None:
    async with open_lane(valkey.url) as lane:
        first, second = (RateLimiter(lane, Settings(workers=1), Metrics(), node_id=f"node {n}") for n in range(2))
        await second.beat()
        await first.beat()
        await lane.call("FLUSHALL")
        await first.beat()
        assert first.seen_nodes == 2
        for _ in range(BEATS_BELIEVED):
            await first.beat()
        assert first.seen_nodes == 1


async def test_redis_that_forgets_or_forbids_the_script_still_counts(valkey: Valkey) -> None:
    async with open_limiter(valkey.url) as limiter, open_lane(valkey.url) as control:
        principal = make_principal()
        await limiter.admit(principal)
        await control.call("SCRIPT", "FLUSH")
        assert (await limiter.admit(principal)).remaining == 58
        rules = ("on", "nopass", "~ibex:*", "+@all", "-evalsha", "-script")
        await control.call("ACL", "SETUSER", "plain", *rules)
        async with open_limiter(f"unix://plain:x@{valkey.path}?db=3") as plain:
            assert [(await plain.admit(principal)).remaining for _ in range(2)] == [57, 56]
            assert not plain.is_local


async def test_a_frozen_redis_stops_nobody_for_long(valkey: Valkey) -> None:
    """All requests that meet the frozen Redis get their answer from the local window; none is left waiting."""
    async with open_limiter(valkey.url, deadline=0.02, rate_limit_rpm=100_000) as limiter:
        principal = make_principal()
        await limiter.admit(principal)
        os.kill(valkey.pid, signal.SIGSTOP)
        try:
            async with asyncio.timeout(10):
                for _ in range(100):
                    await admit_many(limiter, principal, 10)
        finally:
            os.kill(valkey.pid, signal.SIGCONT)


def test_the_breaker_lets_one_probe_through_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("ibex.pipeline.breaker.time.monotonic", lambda: now)
    breaker = Breaker()
    assert [breaker.record_failure() for _ in range(3)] == [False, False, True]
    assert not breaker.admits_call()
    now += 0.11
    assert [breaker.admits_call(), breaker.admits_call()] == [True, False]
    assert not breaker.record_failure()
    now += 0.11
    assert not breaker.admits_call()
    now += 0.11
    assert breaker.admits_call()
    assert breaker.record_success()
    assert breaker.admits_call()
    assert not breaker.record_success()


def test_the_local_window_slides(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.25
    monkeypatch.setattr("ibex.pipeline.local_window.time.monotonic", lambda: now)
    windows = LocalWindows()

    def take(places: int, org: int = 4, agent: int = 3) -> tuple[int, list[int]]:
        taken = windows.take(("org", "agent"), (org, agent), (40, 30), places)
        return taken.granted, [scope.remaining for scope in taken.scopes]

    assert take(2) == (2, [2, 1])
    now += 0.5
    assert take(2) == (1, [1, 0])
    assert take(1) == (0, [1, 0])
    assert take(2, agent=9) == (1, [0, 5])
    now += 59.9
    assert take(1) == (0, [0, 0])
    now += 0.2
    assert take(1) == (1, [3, 2])
    state = windows.take(("org",), (1,), (40,), 0).scopes[0]
    assert state.limit == 40
    assert state.next_free_ms / 1000 - time.time() == pytest.approx(60, abs=5)


def test_workers_of_a_node_share_its_name(tmp_path: object) -> None:
    here = Settings.model_validate({"data_dir": tmp_path})
    assert name_node(here) == name_node(here)
    assert name_node(here) != name_node(Settings.model_validate({"data_dir": f"{tmp_path}/other"}))
