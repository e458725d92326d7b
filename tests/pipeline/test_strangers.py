"""What callers cost whom nobody knows: places for look-ups, and a short memory of refusals."""

import asyncio
from uuid import uuid4

import pytest

from ibex.errors import RateLimited
from ibex.pipeline import strangers
from ibex.pipeline.strangers import ADDRESS_BURST, REFUSED_SECONDS, TOTAL_BURST, Refusals, StrangerGate


class Clock:
    def __init__(self) -> None:
        self.moment = 1000.0

    def __call__(self) -> float:
        return self.moment


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(strangers, "monotonic", clock)
    return clock


async def enter(gate: StrangerGate, address: str) -> str:
    """What comes of it: let in at once, told to wait, or refused."""
    entering = asyncio.get_running_loop().create_task(gate.enter(address))
    await asyncio.sleep(0)
    if not entering.done():
        entering.cancel()
        return "waits"
    return "refused" if entering.exception() else "in"


async def test_an_address_has_a_burst_then_waits_up_to_a_second_then_is_refused(clock: Clock) -> None:
    gate = StrangerGate()

    outcomes = [await enter(gate, "192.0.2.1") for _ in range(300)]

    assert outcomes == ["in"] * int(ADDRESS_BURST) + ["waits"] * 50 + ["refused"] * 50
    assert await enter(gate, "192.0.2.2") == "in"
    clock.moment += 1.0
    assert [await enter(gate, "192.0.2.1") for _ in range(51)] == ["waits"] * 50 + ["refused"]
    clock.moment += 60.0
    assert await enter(gate, "192.0.2.1") == "in"


async def test_all_addresses_share_the_places_there_are(clock: Clock) -> None:
    gate = StrangerGate()
    outcomes = [await enter(gate, f"192.0.2.{number}") for number in range(1200)]

    assert outcomes.count("in") == int(TOTAL_BURST)
    assert outcomes.count("waits") == 500
    assert outcomes[-1] == "refused"


async def test_the_workers_of_a_node_share_the_places_there_are(clock: Clock) -> None:
    gate = StrangerGate(workers=4)
    outcomes = [await enter(gate, f"192.0.2.{number}") for number in range(300)]

    assert outcomes.count("in") == outcomes.count("waits") == 125
    assert outcomes[-1] == "refused"


async def test_a_token_known_good_has_places_of_its_own_for_new_agents(clock: Clock) -> None:
    gate = StrangerGate()
    while await enter(gate, "192.0.2.1") != "refused":
        pass
    noisy, quiet = uuid4(), uuid4()
    for _ in range(int(ADDRESS_BURST)):
        await gate.enter_known(noisy)
    clock.moment -= 5.0
    with pytest.raises(RateLimited, match="not known here"):
        await gate.enter_known(noisy)
    await gate.enter_known(quiet)


async def test_the_addresses_remembered_are_bounded(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strangers, "MOST_ADDRESSES", 10)
    gate = StrangerGate()
    for number in range(30):
        await enter(gate, f"192.0.2.{number}")

    assert len(gate._buckets) == 10


async def test_a_refusal_is_remembered_for_ten_seconds(clock: Clock) -> None:
    refusals, key, token = Refusals(), (b"digest", "agent"), uuid4()
    refusals.add(key, None, [token])
    clock.moment += REFUSED_SECONDS - 0.1
    assert refusals.find(key) is not None
    assert refusals.find((b"digest", "other")) is None
    clock.moment += 0.1
    assert refusals.find(key) is None
    assert not refusals._keys


async def test_a_refusal_is_forgotten_when_what_it_rests_on_changes(clock: Clock) -> None:
    refusals, first, second, org = Refusals(), uuid4(), uuid4(), uuid4()
    for token in (first, second):
        refusals.add((token.bytes, ""), None, [token, org])
    refusals.forget(first)
    refusals.forget(uuid4())
    assert [refusals.find((token.bytes, "")) is None for token in (first, second)] == [True, False]
    refusals.forget(org)
    assert (len(refusals), dict(refusals._keys)) == (0, {})
    refusals.add((b"", ""), None, [first])
    refusals.forget(None)
    assert (len(refusals), dict(refusals._keys)) == (0, {})


async def test_the_refusals_remembered_are_bounded(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strangers, "MOST_REFUSED", 10)
    refusals, token = Refusals(), uuid4()
    for number in range(30):
        refusals.add((b"%d" % number, ""), None, [token])

    assert len(refusals) == len(refusals._keys[token]) == 10
    assert refusals.find((b"29", "")) is not None
