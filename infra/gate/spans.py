"""A receiver of OTLP over HTTP, as a collector is one: what the house exports arrives here and can be read."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class SpanReceiver:
    """The spans that arrived."""

    def __init__(self) -> None:
        self.endpoint = ""
        """What `OTEL_EXPORTER_OTLP_ENDPOINT` is set to."""
        self.requests: list[ExportTraceServiceRequest] = []

    def of_trace(self, trace_id: bytes) -> list[Span]:
        """The spans of one trace so far."""
        return [span for span in self._all() if span.trace_id == trace_id]

    def last_trace(self) -> bytes | None:
        """The id of the trace that the last span belongs to."""
        return next((span.trace_id for span in reversed(list(self._all()))), None)

    def _all(self) -> Iterator[Span]:
        for request in self.requests:
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    yield from scope.spans

    async def receive(self, request: web.Request) -> web.Response:
        """`POST /v1/traces`."""
        self.requests.append(ExportTraceServiceRequest.FromString(await request.read()))
        body = ExportTraceServiceResponse().SerializeToString()
        return web.Response(body=body, content_type="application/x-protobuf")


@asynccontextmanager
async def receiving_spans() -> AsyncIterator[SpanReceiver]:
    """A receiver, listening on loopback."""
    receiver = SpanReceiver()
    app = web.Application(client_max_size=16 << 20)
    app.router.add_post("/v1/traces", receiver.receive)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        receiver.endpoint = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield receiver
    finally:
        await runner.cleanup()
