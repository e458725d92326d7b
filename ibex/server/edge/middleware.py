"""What surrounds every request: its id, its clock, its trace; errors become the envelope here and nowhere else."""

import asyncio
import ipaddress
import logging
import time
from typing import Any

from ibex.config import Settings
from ibex.errors import InternalError, RequestError
from ibex.pipeline.recording import CLIENT_LEFT
from ibex.server.edge.envelope import encode_error, error_headers
from ibex.server.edge.head import (
    KNOWN_METHODS,
    RequestHead,
    choose_request_id,
    find_address,
    is_trusted,
)
from ibex.server.edge.inbound import Inbound
from ibex.server.edge.protocol import EdgeProtocol
from ibex.server.edge.repeats import Payload
from ibex.server.edge.routes import Routes
from ibex.server.edge.wire import WireReply
from ibex.telemetry import AccessLog, Metrics, RequestFacts, RequestScope, Stage, StageClock, Tracing
from ibex.telemetry.metrics import CounterChild, HistogramChild

log = logging.getLogger("ibex.server")

PROBES = frozenset({"health", "ready", "metrics"})
"""Routes that machines ask every few seconds: they leave spans only where their caller traces them."""


class Middleware:
    """Takes each request from its connection, has its route answer it, and sees to what all requests share."""

    def __init__(
        self, settings: Settings, routes: Routes, metrics: Metrics, tracing: Tracing, access_log: AccessLog
    ) -> None:
        self._settings = settings
        self._routes = routes
        self._metrics = metrics
        self._tracing = tracing
        self._access_log = access_log
        self._trusted = tuple(ipaddress.ip_network(text, strict=False) for text in settings.trusted_proxies)
        self.is_draining = False
        """From then on each answer is the last of its connection."""
        self.replies: set[WireReply] = set()
        """Those that have not ended."""
        self._counters: dict[tuple[str, str, str], tuple[CounterChild, HistogramChild]] = {}
        self._json_overhead = metrics.overhead_seconds.labels("false")
        self._stream_overhead = metrics.overhead_seconds.labels("true")

    def interrupt(self, reason: RequestError) -> None:
        """Have every reply that is under way end with this error; whoever calls this cancels their tasks."""
        for reply in self.replies:
            reply.interruption, reply.keep_alive = reason, False

    def is_trusted(self, address: str) -> bool:
        """Whether an address is a trusted proxy's."""
        return is_trusted(address, self._trusted)

    async def serve(self, protocol: EdgeProtocol, head: RequestHead, payload: Payload) -> WireReply:
        """Answer one request; the reply is on the wire when this returns."""
        inbound = self._receive(protocol, head, payload)
        scope = RequestScope(inbound)
        reply = self._make_reply(inbound)
        self.replies.add(reply)
        route = "unmatched"
        try:
            if head.fault is not None:
                raise head.fault
            route, handler = self._routes.find(inbound)
            if inbound.has_unread_body and head.method != "POST":
                reply.keep_alive = False  # nobody will read it
            await handler(inbound, reply)
        except RequestError as error:
            await self._refuse(inbound, reply, error)
        except asyncio.CancelledError:
            reply.keep_alive = False
            if reply.interruption is None:
                raise
            await self._refuse(inbound, reply, reply.interruption)
        except Exception as error:  # noqa: BLE001 - a bug is a 500 with an id, not a dead connection
            await self._recover(inbound, reply, error)
        finally:
            self.replies.discard(reply)
            protocol.end_request()
            self._account(inbound, reply, route)
            scope.end()
        if head.fault is not None or inbound.has_unread_body:
            reply.keep_alive = False
            await protocol.linger()
        return reply

    def _receive(self, protocol: EdgeProtocol, head: RequestHead, payload: Payload) -> Inbound:
        started = protocol.begin_request()
        headers = head.headers
        return Inbound(
            head=head,
            payload=payload,
            protocol=protocol,
            address=find_address(protocol.address, headers, self._trusted) if self._trusted else protocol.address,
            request_id=choose_request_id(headers.get("X-Request-ID")),
            clock=StageClock(started, time.time() - (time.perf_counter() - started)),
            trace=self._tracing.begin(headers),
        )

    def _make_reply(self, inbound: Inbound) -> WireReply:
        head = inbound.head
        return WireReply(
            inbound.protocol,
            inbound.clock,
            self._metrics,
            inbound.request_id,
            trace_id=None if inbound.trace is None else inbound.trace.trace_id_hex,
            is_http10=head.is_http10,
            keeps_alive=not (head.ends_connection or head.fault is not None or self.is_draining),
            is_head_only=head.method == "HEAD",
            slow_client_seconds=self._settings.slow_client_seconds,
        )

    async def _recover(self, inbound: Inbound, reply: WireReply, error: Exception) -> None:
        """A client that has left is nobody's fault; anything else that is no RequestError is ours."""
        transport = inbound.protocol.transport
        if isinstance(error, ConnectionError) and (transport is None or transport.is_closing()):
            reply.keep_alive = False
            return
        log.error("request failed", exc_info=error)
        await self._refuse(inbound, reply, InternalError())

    async def _refuse(self, inbound: Inbound, reply: WireReply, error: RequestError) -> None:
        """Answer with the envelope; a reply that is under way can only be cut."""
        try:
            if reply.has_left:
                await reply.cut(error)
                return
            if inbound.has_unread_body:
                reply.keep_alive = False
            reply.error_code = error.code
            body = encode_error(error, inbound.request_id)
            reply.begin(error.http_status, {**inbound.reply_headers, **error_headers(error)}, length=len(body))
            await reply.finish(body)
        except ConnectionError:
            reply.keep_alive = False

    def _account(self, inbound: Inbound, reply: WireReply, route: str) -> None:
        """Count a request that is over, log its line, make its spans."""
        clock = inbound.clock
        elapsed = clock.elapsed()
        status = str(reply.status if reply.has_left else CLIENT_LEFT)
        method = inbound.head.method
        if method not in KNOWN_METHODS:
            method = "other"
        requests, durations = self._counters.get((route, method, status)) or self._count_as(route, method, status)
        requests.inc()
        durations.observe(elapsed)
        if reply.error_code is not None:
            self._metrics.errors_total.labels(reply.error_code).inc()
        if clock.first_byte_out is not None and route == "chat":
            overhead = clock.first_byte_out - clock.started - clock.seconds(Stage.PROVIDER)
            (self._stream_overhead if reply.is_stream else self._json_overhead).observe(max(0.0, overhead))
        trace = inbound.trace
        if trace is not None and self._tracing.keeps(trace, int(status)) and (route not in PROBES or trace.has_parent):
            template = self._routes.template_of(inbound.head.path)
            request = RequestFacts(method, template, int(status), reply.error_code, inbound.request_id)
            self._tracing.record(trace, clock, request)
        if self._access_log.is_enabled:
            facts = _access_facts(inbound, reply, route, method, status, elapsed)
            self._access_log.write(clock.wall_started + elapsed, facts)

    def _count_as(self, route: str, method: str, status: str) -> tuple[CounterChild, HistogramChild]:
        """The two series of this kind of request, looked up once."""
        labels = (route, method, status)
        found = self._metrics.requests_total.labels(*labels), self._metrics.request_duration_seconds.labels(*labels)
        self._counters[labels] = found
        return found


def _access_facts(
    inbound: Inbound, reply: WireReply, route: str, method: str, status: str, elapsed: float
) -> dict[str, Any]:
    return {
        "method": method,
        "route": route,
        "status": int(status),
        "duration_ms": round(elapsed * 1e3, 3),
        "stream": reply.is_stream,
        "error_code": reply.error_code,
        "request_id": reply.request_id,
        "turn_id": inbound.reply_headers.get("X-IBEX-Turn-ID"),
        "trace_id": None if inbound.trace is None else inbound.trace.trace_id_hex,
    }
