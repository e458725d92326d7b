"""What a worker writes of a request: one access line, and its ids on every other line that is about it."""

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from ibex.telemetry import configure_logging
from tests.server.conftest import Edge

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
PRODUCTION = [{"access_log": True, "log_format": "json"}]
LOGGERS = ("ibex", "aiohttp.access", "aiohttp.server", "asyncio", "opentelemetry")


@pytest.fixture
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    before = (root.handlers[:], root.level, {name: logging.getLogger(name).level for name in LOGGERS})
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    for name, level in before[2].items():
        logging.getLogger(name).setLevel(level)


def lines_of(edge: Edge, capfd: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """What was written, but for what stores say of themselves."""
    edge.server._access_log.flush()
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    return [line for line in lines if line["logger"] in {"ibex.access", "ibex.providers", "ibex.server", "ibex.test"}]


@pytest.mark.parametrize("edge", PRODUCTION, indirect=True)
@pytest.mark.usefixtures("restored_logging")
async def test_every_line_about_a_request_has_its_ids(edge: Edge, capfd: pytest.CaptureFixture[str]) -> None:
    configure_logging(edge.worker.settings, "worker 0")

    status, headers, _ = await edge.chat(sandbox={"status": 401}, headers={"traceparent": PARENT})

    assert status == 503
    ids = {
        "request_id": headers["x-request-id"],
        "turn_id": headers["x-ibex-turn-id"],
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
    }
    warning, access = lines_of(edge, capfd)
    assert warning["message"] == "the provider refuses the key, or what it may do"
    assert warning["level"] == "warning"
    assert (access["message"], access["route"], access["status"]) == ("request", "chat", 503)
    assert access["error_code"] == "PROVIDER_UNAVAILABLE"
    for line in (warning, access):
        assert {name: line[name] for name in ids} == ids
    assert edge.metrics.errors_total.labels("PROVIDER_UNAVAILABLE").value == 1


@pytest.mark.parametrize("edge", PRODUCTION, indirect=True)
@pytest.mark.usefixtures("restored_logging")
async def test_a_bug_is_logged_with_the_ids_the_client_has(
    edge: Edge, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure_logging(edge.worker.settings, "worker 0")
    monkeypatch.setattr("ibex.pipeline.chat.read_usage", lambda _body: 1 // 0)

    status, headers, _ = await edge.chat()

    assert status == 500
    failed, access = lines_of(edge, capfd)
    assert (failed["message"], failed["level"]) == ("request failed", "error")
    assert failed["error"].startswith("ZeroDivisionError at ")
    assert failed["request_id"] == access["request_id"] == headers["x-request-id"]
    assert failed["turn_id"] == access["turn_id"] == headers["x-ibex-turn-id"]
    assert access["error_code"] == "INTERNAL_ERROR"


@pytest.mark.parametrize("edge", PRODUCTION, indirect=True)
@pytest.mark.usefixtures("restored_logging")
async def test_a_line_between_two_requests_belongs_to_neither(edge: Edge, capfd: pytest.CaptureFixture[str]) -> None:
    configure_logging(edge.worker.settings, "worker 0")
    assert (await edge.chat())[0] == 200

    logging.getLogger("ibex.test").warning("apart")

    apart = next(line for line in lines_of(edge, capfd) if line["message"] == "apart")
    assert "request_id" not in apart
