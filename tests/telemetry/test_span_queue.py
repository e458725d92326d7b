"""A collector that is away, slow or silent costs spans, never time; the log says so once."""

import asyncio
import logging
import time
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest

from ibex.config import Settings
from ibex.telemetry import Metrics
from ibex.telemetry.exporters import listen_to_exporters, open_exporter
from ibex.telemetry.span_queue import MAX_WAITING, SpanQueue
from ibex.telemetry.spans import SpanMaker
from ibex.telemetry.stages import StageClock
from ibex.telemetry.trace_context import RequestFacts, RequestTrace
from tests.telemetry.otlp import RECEIVERS, http_receiver
from tests.waiting import eventually

CLOSED_PORT = "http://127.0.0.1:9"


def make_spans(count: int) -> list[Any]:
    maker, clock = SpanMaker(Settings(), "worker 0"), StageClock(time.perf_counter(), time.time())
    trace = RequestTrace(1, 0, 1, None, exports=True)
    (span,) = maker.make(trace, clock, RequestFacts("GET", "/health", 200, None, uuid4()))
    return [span] * count


def open_queue(endpoint: str, metrics: Metrics, **changes: Any) -> SpanQueue:
    settings = Settings(**{"otel_endpoint": endpoint, "otel_timeout_ms": 300, **changes})
    return SpanQueue(open_exporter(settings), metrics)


def counts(metrics: Metrics) -> dict[str, float]:
    return {result: metrics.otel_spans_total.labels(result).value for result in ("exported", "failed", "dropped")}


@pytest.fixture(autouse=True)
def logging_of_a_worker() -> Iterator[None]:
    """The library's own lines are switched off, as `configure_logging` does it."""
    library = logging.getLogger("opentelemetry")
    level = library.level
    library.setLevel(logging.CRITICAL)
    yield
    library.setLevel(level)


@pytest.mark.parametrize("protocol", RECEIVERS)
async def test_a_collector_that_is_away_is_said_once_each_way(
    protocol: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ibex.telemetry.span_queue.GATHER_SECONDS", 0.01)
    caplog.set_level(logging.INFO, logger="ibex")
    metrics = Metrics()
    queue = open_queue(CLOSED_PORT, metrics, otel_protocol=protocol)
    for so_far in (1, 2):
        queue.offer(make_spans(1))
        await eventually(lambda so_far=so_far: counts(metrics)["failed"] == so_far)
    with RECEIVERS[protocol]() as receiver:
        queue._exporter = open_exporter(Settings(otel_endpoint=receiver.endpoint, otel_protocol=protocol))
        queue.offer(make_spans(1))
        await eventually(lambda: receiver.spans)
        await queue.close()

    assert counts(metrics) == {"exported": 1, "failed": 2, "dropped": 0}
    lost, again = caplog.records
    assert (lost.message, again.message) == ("spans are lost", "spans reach the collector again")
    assert lost.reason.startswith("Failed to export ")


@pytest.mark.parametrize("protocol", RECEIVERS)
async def test_a_collector_that_never_answers_slows_nobody_and_bounds_the_end(
    protocol: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ibex.telemetry.span_queue.GATHER_SECONDS", 0.01)
    monkeypatch.setattr("ibex.telemetry.span_queue.CLOSE_SECONDS", 0.2)
    metrics = Metrics()
    with RECEIVERS[protocol]() as receiver:
        receiver.may_answer.clear()
        queue = open_queue(receiver.endpoint, metrics, otel_protocol=protocol, otel_timeout_ms=60_000)
        queue.offer(make_spans(1))
        await eventually(lambda: not queue._waiting)  # the thread has it, and waits for an answer

        began = time.perf_counter()
        for _ in range(MAX_WAITING // 10 + 100):
            queue.offer(make_spans(10))
        assert time.perf_counter() - began < 1.0
        dropped = counts(metrics)["dropped"]
        assert len(queue._waiting) <= MAX_WAITING
        assert dropped >= 990

        began = time.perf_counter()
        await queue.close()
        assert time.perf_counter() - began < 2.0

    assert counts(metrics)["dropped"] == dropped + MAX_WAITING // 10 * 10
    assert [record.message for record in caplog.records] == ["spans are lost", "spans were left behind"]


async def test_what_waits_at_the_end_is_sent() -> None:
    metrics = Metrics()
    with http_receiver() as receiver:
        queue = open_queue(receiver.endpoint, metrics)
        queue.offer(make_spans(500))
        await queue.close()

    assert len(receiver.spans) == 500
    assert counts(metrics) == {"exported": 500, "failed": 0, "dropped": 0}


async def test_a_refusal_says_its_status_and_never_a_header(caplog: pytest.LogCaptureFixture) -> None:
    with http_receiver() as receiver:
        receiver.status = 401
        queue = open_queue(receiver.endpoint, Metrics(), otel_headers="authorization=s3cret")
        queue.offer(make_spans(1))
        await queue.close()
        await asyncio.sleep(0)

    (lost,) = caplog.records
    assert "401" in lost.reason
    assert "s3cret" not in caplog.text


def test_the_reason_is_what_the_library_said_first_of_a_batch() -> None:
    words, library = listen_to_exporters(), logging.getLogger("opentelemetry.exporter.some.of.them")
    words.listen()
    library.warning("Transient error %s,\n retrying", "Connection refused" + "!" * 400)
    library.error("Failed due to timeout")

    assert words.text.startswith("Transient error Connection refused!")
    assert len(words.text) == 300
    words.listen()
    library.error("Failed, code: 401")
    assert words.text == "Failed, code: 401"
