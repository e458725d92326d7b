"""Trace context in and out, and spans as a real OTLP receiver reads them."""

import gzip
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from ibex.config import Settings
from ibex.telemetry import Stage, StageClock, Tracing
from ibex.telemetry.trace_context import parse_traceparent

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Receiver(HTTPServer):
    """Takes OTLP over HTTP and keeps the spans."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: list[Any] = []


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        request = ExportTraceServiceRequest.FromString(body)
        assert isinstance(self.server, Receiver)
        self.server.spans += [s for r in request.resource_spans for scope in r.scope_spans for s in scope.spans]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    server = Receiver()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def settings_for(receiver: Receiver, ratio: float = 1.0) -> Settings:
    return Settings(otel_endpoint=f"http://127.0.0.1:{receiver.server_port}", otel_sample_ratio=ratio)


def finished_clock() -> StageClock:
    clock = StageClock(time.perf_counter(), time.time())
    clock.finish(Stage.AUTHENTICATION)
    clock.finish(Stage.PROVIDER)
    return clock


def test_a_sampled_request_is_a_span_with_its_stages(receiver: Receiver) -> None:
    tracing = Tracing(settings_for(receiver), "worker 0")
    request = tracing.begin(PARENT)
    assert request is not None

    tracing.record(request, finished_clock(), "POST chat", {"http.route": "chat"}, 503)
    tracing.close()

    spans = {span.name: span for span in receiver.spans}
    assert set(spans) == {"POST chat", "authentication", "provider"}
    server = spans["POST chat"]
    assert server.trace_id.hex() == request.trace_id_hex == "0af7651916cd43dd8448eb211c80319c"
    assert server.parent_span_id.hex() == "b7ad6b7169203331"
    assert f"-{server.span_id.hex()}-01" in request.traceparent
    assert {span.parent_span_id for name, span in spans.items() if name != "POST chat"} == {server.span_id}
    assert server.start_time_unix_nano <= spans["authentication"].start_time_unix_nano
    assert server.status.code == 2


def test_a_request_its_caller_does_not_sample_leaves_nothing(receiver: Receiver) -> None:
    tracing = Tracing(settings_for(receiver), "worker 0")
    request = tracing.begin(PARENT[:-2] + "00")
    assert request is not None

    tracing.record(request, finished_clock(), "POST chat", {}, 200)
    tracing.close()

    assert receiver.spans == []
    assert request.traceparent == PARENT[:-2] + "00"


def test_without_a_parent_chance_decides(receiver: Receiver) -> None:
    never, always = Tracing(settings_for(receiver, 0.0), "w"), Tracing(settings_for(receiver, 1.0), "w")

    begun = [tracing.begin(None) for tracing in (never, always)]

    assert [request is not None and request.is_sampled for request in begun] == [False, True]
    never.close()
    always.close()


def test_without_a_collector_a_callers_words_go_on_unchanged() -> None:
    tracing = Tracing(Settings(), "worker 0")

    request = tracing.begin(PARENT)

    assert request is not None
    assert not request.is_sampled
    assert request.traceparent == PARENT
    assert tracing.begin(None) is None


@pytest.mark.parametrize(
    "header",
    [
        "",
        "junk",
        PARENT.upper(),
        PARENT + "-x",
        "00-" + "0" * 32 + "-b7ad6b7169203331-01",
        PARENT[:36] + "0" * 16 + "-01",
        "ff" + PARENT[2:],
    ],
)
def test_what_is_no_traceparent_is_ignored(header: str) -> None:
    assert parse_traceparent(header) is None
