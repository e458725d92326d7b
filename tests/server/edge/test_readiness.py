"""What /ready says of stores and a provider that are away: degraded while somebody can be served, else unhealthy."""

from typing import Any

import pytest

from ibex.config import Secret
from tests.server.conftest import Edge

NOBODY = "127.0.0.1:9"
NO_POSTGRES = {"postgres_dsn": Secret(f"postgresql://ibex_app:x@{NOBODY}/ibex")}
NO_REDIS = {"redis_url": Secret(f"redis://{NOBODY}/0")}


async def readiness(edge: Edge) -> tuple[int, str, dict[str, str]]:
    """Status code, word, and the checks that are not ok."""
    async with edge.http.get(f"{edge.url}/ready") as response:
        answer: dict[str, Any] = await response.json()
    checks = {name: check["status"] for name, check in answer["checks"].items() if check["status"] != "ok"}
    return response.status, answer["status"], checks


@pytest.mark.parametrize(
    ("edge", "status", "word", "away"),
    [
        ({}, 200, "ok", set()),
        (NO_POSTGRES, 200, "degraded", {"postgres"}),
        (NO_REDIS, 200, "degraded", {"redis"}),
        (NO_POSTGRES | NO_REDIS, 503, "unhealthy", {"postgres", "redis"}),
    ],
    indirect=["edge"],
    ids=["none", "postgres", "redis", "both"],
)
async def test_a_store_that_is_away_degrades_and_two_make_unhealthy(
    edge: Edge, status: int, word: str, away: set[str]
) -> None:
    assert await readiness(edge) == (status, word, dict.fromkeys(away, "unhealthy"))


async def test_a_provider_that_fails_degrades_until_it_answers(edge: Edge) -> None:
    assert (await edge.chat(sandbox={"status": 503}))[0] == 503
    assert await readiness(edge) == (200, "degraded", {"provider": "degraded"})
    assert (await edge.chat())[0] == 200
    assert await readiness(edge) == (200, "ok", {})
