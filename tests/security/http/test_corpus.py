"""Every case of the corpus, in every way it can arrive: what may be answered, and what may never happen."""

import asyncio
import logging
from collections.abc import Callable, Iterator

import pytest

from tests.security.http.corpus import CANARY, FAMILIES, PROMPT, SMUGGLED, Case, load, make_parts
from tests.security.http.raw_client import at_random, byte_by_byte, converse, in_one, with_a_pause
from tests.server.conftest import Edge
from tests.waiting import eventually

WAYS: list[Callable[[bytes], Iterator[bytes | float]]] = [in_one, byte_by_byte, at_random, with_a_pause]
AT_ONCE = 16

LOGGED = {"access_log": True, "log_level": "debug", "log_format": "json", "rate_limit_rpm": 1_000_000}


@pytest.mark.parametrize("edge", [LOGGED], indirect=True)
@pytest.mark.parametrize("family", FAMILIES)
async def test_hostile_bytes_are_answered_as_they_deserve(
    edge: Edge, family: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    cases = load(family, make_parts(edge.tenant.bearer, str(edge.tenant.agent_id)))
    places = asyncio.Semaphore(AT_ONCE)

    async def send(case: Case, way: Callable[[bytes], Iterator[bytes | float]]) -> str | None:
        async with places:
            transcript = await converse(edge.port, way(case.data), case.answers, is_head=case.is_head)
        wanted = " or ".join(sorted(case.answers))
        return None if transcript in case.answers else f"{case.name} ({way.__name__}): {transcript}, not {wanted}"

    failures = await asyncio.gather(*(send(case, way) for case in cases for way in WAYS))

    assert [failure for failure in failures if failure] == []
    assert not any(SMUGGLED.encode() in request.body for request in edge.sandbox.requests)
    await eventually(lambda: edge.metrics.active_connections.labels().value == 0)
    await edge.server.close()
    logged = caplog.text + capfd.readouterr().err
    for secret in (edge.tenant.bearer, edge.tenant.bearer[-20:], CANARY, PROMPT, SMUGGLED, "Traceback"):
        assert secret not in logged
    assert not [record for record in caplog.records if record.name.startswith("aiohttp")]


def test_the_corpus_is_large_and_every_case_says_why() -> None:
    cases = [case for family in FAMILIES for case in load(family, make_parts("t", "a"))]

    assert len(cases) >= 200
    assert all(case.why and case.answers for case in cases)
    assert len({(case.name, case.data) for case in cases}) == len(cases)
