"""A real OTLP receiver, over HTTP or gRPC, that keeps the spans it is sent; it can also be refusing or mute."""

import gzip
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)


class Receiver:
    """What came in: each span once, the resources they came with, and the headers of each request."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.resource: dict[str, str] = {}
        self.headers: dict[str, str] = {}
        self.endpoint = ""
        self.status = 200
        """What HTTP requests are answered with."""
        self.may_answer = threading.Event()
        """Cleared: requests get no answer."""
        self.may_answer.set()

    def take(self, request: ExportTraceServiceRequest) -> None:
        """Keep what a request holds."""
        for block in request.resource_spans:
            self.resource = {a.key: a.value.string_value for a in block.resource.attributes}
            self.spans += [span for scope in block.scope_spans for span in scope.spans]

    def by_name(self) -> dict[str, Any]:
        """The spans by their names, which must differ."""
        names = [span.name for span in self.spans]
        assert len(set(names)) == len(names), names
        return dict(zip(names, self.spans, strict=True))


def attributes(span: Any) -> dict[str, Any]:
    """A span's attributes as plain values."""
    return {attribute.key: _plain(attribute.value) for attribute in span.attributes}


def _plain(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [_plain(part) for part in value.array_value.values] if kind == "array_value" else getattr(value, kind)


@contextmanager
def http_receiver(port: int = 0) -> Iterator[Receiver]:
    """A receiver of OTLP over HTTP."""
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            receiver.may_answer.wait()
            receiver.headers = {name.lower(): value for name, value in self.headers.items()}
            receiver.headers["path"] = self.path
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if receiver.status == 200:
                receiver.take(ExportTraceServiceRequest.FromString(body))
            self.send_response(receiver.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    receiver.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield receiver
    finally:
        receiver.may_answer.set()
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def grpc_receiver() -> Iterator[Receiver]:
    """A receiver of OTLP over gRPC."""
    receiver = Receiver()

    class Service(TraceServiceServicer):
        def Export(  # noqa: N802 - gRPC's name
            self, request: ExportTraceServiceRequest, context: Any
        ) -> ExportTraceServiceResponse:
            receiver.may_answer.wait()
            receiver.headers = {str(name): str(value) for name, value in context.invocation_metadata()}
            receiver.take(request)
            return ExportTraceServiceResponse()

    server = grpc.server(ThreadPoolExecutor(2))
    add_TraceServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    receiver.endpoint = f"http://127.0.0.1:{port}"
    server.start()
    try:
        yield receiver
    finally:
        receiver.may_answer.set()
        server.stop(0).wait()


RECEIVERS = {"http/protobuf": http_receiver, "grpc": grpc_receiver}
