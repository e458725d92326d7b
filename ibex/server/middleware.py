"""What surrounds every request: its id, its clock, its trace; errors become the envelope here and nowhere else."""

import asyncio
import ipaddress
import logging
import time
from typing import Any

from aiohttp import web

from ibex.config import Settings
from ibex.errors import InternalError, MethodNotAllowed, RequestError, ValidationFailed
from ibex.server.envelope import encode_error, error_headers
from ibex.server.inbound import Inbound, check_head, choose_request_id, find_address, read_path
from ibex.server.protocol import EdgeProtocol, peer_address
from ibex.server.routes import Routes
from ibex.server.wire import WireReply
from ibex.telemetry import AccessLog, Metrics, Stage, StageClock, Tracing

log = logging.getLogger("ibex.server")

KNOWN_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Middleware:
    """Takes each request from aiohttp, has its route answer it, and sees to what all requests share."""

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
        self.in_flight = 0

    def is_trusted(self, address: str) -> bool:
        """Whether an address is a trusted proxy's."""
        return bool(self._trusted) and any(ipaddress.ip_address(address) in network for network in self._trusted)

    async def handle(self, request: web.BaseRequest) -> WireReply:
        """Answer one request; the reply is on the wire when this returns."""
        return await self._serve(request, None)

    async def handle_fault(self, request: web.BaseRequest, error: RequestError) -> WireReply:
        """Answer bytes that were no request."""
        return await self._serve(request, error)

    async def _serve(self, request: web.BaseRequest, fault: RequestError | None) -> WireReply:
        protocol = request._protocol  # the connection itself: replies are written to its transport
        assert isinstance(protocol, EdgeProtocol)  # noqa: S101
        inbound = self._receive(request, protocol)
        reply = self._make_reply(request, inbound, is_last=fault is not None or self.is_draining)
        self.in_flight += 1
        route = "unmatched"
        try:
            if fault is not None:
                raise fault
            check_head(inbound.headers, request._message.raw_headers, needs_host=request.version >= (1, 1))
            route, handler = self._routes.find(inbound)
            await handler(inbound, reply)
        except RequestError as error:
            await self._refuse(inbound, reply, error)
        except ConnectionError:
            reply.keep_alive = False
        except asyncio.CancelledError:
            reply.keep_alive = False
            raise
        except Exception as error:  # whatever a handler lets through is a 500 with an id, not a dead connection
            log.error("request failed", exc_info=error, extra={"request_id": str(inbound.request_id)})
            await self._refuse(inbound, reply, InternalError())
        finally:
            self.in_flight -= 1
            protocol.end_request()
            self._account(inbound, reply, route)
        if inbound.has_unread_body:
            reply.keep_alive = False
        return reply

    def _receive(self, request: web.BaseRequest, protocol: EdgeProtocol) -> Inbound:
        message = request._message  # the raw target: parsing it as a URL costs and can fail
        started = protocol.begin_request()
        clock = StageClock(started, time.time() - (time.perf_counter() - started))
        headers = message.headers or request.headers
        return Inbound(
            method=message.method,
            path=read_path(message.path),
            headers=headers,
            payload=request.content,
            protocol=protocol,
            address=find_address(peer_address(protocol.transport), headers, self._trusted),
            request_id=choose_request_id(headers.get("X-Request-ID")),
            clock=clock,
            trace=self._tracing.begin(headers.get("traceparent")),
        )

    def _make_reply(self, request: web.BaseRequest, inbound: Inbound, *, is_last: bool) -> WireReply:
        headers = inbound.headers
        is_last = is_last or "Transfer-Encoding" in headers or "Upgrade" in headers or request._message.should_close
        return WireReply(
            inbound.protocol,
            inbound.clock,
            self._metrics,
            inbound.request_id,
            trace_id=None if inbound.trace is None else inbound.trace.trace_id_hex,
            is_http10=request.version < (1, 1),
            keeps_alive=not is_last,
            is_head_only=inbound.method == "HEAD",
        )

    async def _refuse(self, inbound: Inbound, reply: WireReply, error: RequestError) -> None:
        """Answer with the envelope; a reply that is under way can only be cut."""
        try:
            if reply.has_left:
                await reply.cut(error)
                return
            if inbound.has_unread_body or (isinstance(error, MethodNotAllowed) and inbound.method not in KNOWN_METHODS):
                reply.keep_alive = False
            if isinstance(error, ValidationFailed) and error.param == "Host":
                reply.keep_alive = False
            body = encode_error(error, inbound.request_id)
            reply.begin(error.http_status, {**inbound.reply_headers, **error_headers(error)}, length=len(body))
            await reply.finish(body)
        except ConnectionError:
            reply.keep_alive = False

    def _account(self, inbound: Inbound, reply: WireReply, route: str) -> None:
        """Count a request that is over, log its line, make its spans."""
        clock, metrics = inbound.clock, self._metrics
        elapsed = clock.elapsed()
        status = str(reply.status or 499)
        method = inbound.method if inbound.method in KNOWN_METHODS else "other"
        metrics.requests_total.labels(route, method, status).inc()
        metrics.request_duration_seconds.labels(route, method, status).observe(elapsed)
        if clock.first_byte_out is not None and route == "chat":
            overhead = clock.first_byte_out - clock.started - clock.seconds(Stage.PROVIDER)
            metrics.overhead_seconds.labels("true" if reply.is_stream else "false").observe(max(0.0, overhead))
        if inbound.trace is not None and inbound.trace.is_sampled:
            self._tracing.record(
                inbound.trace,
                clock,
                f"{method} {route}",
                {"http.request.method": method, "http.route": route},
                int(status),
            )
        if self._access_log.is_enabled:
            self._access_log.write(clock.wall_now(), self._access_facts(inbound, reply, route, status, elapsed))

    @staticmethod
    def _access_facts(inbound: Inbound, reply: WireReply, route: str, status: str, elapsed: float) -> dict[str, Any]:
        return {
            "method": inbound.method if inbound.method in KNOWN_METHODS else "other",
            "route": route,
            "status": int(status),
            "duration_ms": round(elapsed * 1e3, 3),
            "stream": reply.is_stream,
            "request_id": str(inbound.request_id),
            "turn_id": inbound.reply_headers.get("X-IBEX-Turn-ID"),
            "trace_id": None if inbound.trace is None else inbound.trace.trace_id_hex,
        }
