"""A journal near its bounds: /ready says so, then chats are refused before they are forwarded, then all is well."""

import json
import time
from pathlib import Path
from uuid import UUID

import pytest

from ibex.stores.journal.segments import HEADER_SIZE
from tests.server.conftest import Edge
from tests.waiting import eventually

MAX_BYTES = 1 << 20


async def readiness(edge: Edge) -> tuple[int, str, str]:
    async with edge.http.get(f"{edge.url}/ready") as response:
        answer = await response.json()
        return response.status, answer["status"], answer["checks"]["journal"].get("message", "")


async def see(edge: Edge, low: float, high: float) -> None:
    """Wait until the worker has measured its journal again."""
    await eventually(lambda: low <= edge.worker.journal.pressure <= high)


@pytest.mark.parametrize("edge", [{"journal_max_bytes": MAX_BYTES, "journal_min_free_bytes": 0}], indirect=True)
async def test_a_journal_that_grows_is_told_of_and_then_refuses(edge: Edge) -> None:
    filler = Path(edge.worker.settings.journal_dir) / "filler.segment.quarantine"
    assert await readiness(edge) == (200, "ok", "")

    filler.write_bytes(b"x" * (MAX_BYTES * 85 // 100))
    await see(edge, 0.8, 0.99)
    status, summary, message = await readiness(edge)
    assert (status, summary) == (200, "degraded")
    assert "% full" in message
    assert (await edge.chat())[0] == 200

    filler.write_bytes(b"x" * MAX_BYTES)
    await see(edge, 1, 1)
    assert (await readiness(edge))[:2] == (503, "unhealthy")
    status, _, content = await edge.chat()
    assert (status, json.loads(content)["error"]["code"]) == (503, "SERVICE_DEGRADED")
    assert len(edge.sandbox.requests) == 1

    filler.unlink()
    await see(edge, 0, 0.5)
    assert await readiness(edge) == (200, "ok", "")
    assert (await edge.chat())[0] == 200


@pytest.mark.parametrize("edge", [{"journal_max_age_seconds": 100, "journal_min_free_bytes": 0}], indirect=True)
async def test_a_turn_that_waits_too_long_is_told_of_and_then_refuses(edge: Edge) -> None:
    journal_dir = Path(edge.worker.settings.journal_dir)

    def leave_segment(age: float, size: int) -> Path:
        milliseconds = int((time.time() - age) * 1000)
        path = journal_dir / f"{UUID(int=milliseconds << 80 | 0x7 << 76 | 0b10 << 62)}.segment"
        path.write_bytes(b"x" * size)
        return path

    leave_segment(1000, HEADER_SIZE)  # nothing waits in it
    old = leave_segment(90, HEADER_SIZE + 1)
    await see(edge, 0.8, 0.99)
    assert (await readiness(edge))[:2] == (200, "degraded")

    old.rename(leave_segment(200, 0))
    await see(edge, 1, 1)
    assert (await readiness(edge))[:2] == (503, "unhealthy")
