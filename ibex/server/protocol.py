"""aiohttp's connection, and what its parser alone does not give: the first byte's time, deadlines, caps, one envelope."""

from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import Any, ClassVar

from aiohttp import web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.web_protocol import RequestHandler

from ibex.domain.turns import mint_uuid7
from ibex.errors import HeadersTooLarge, RequestError, RequestTimeout, ValidationFailed
from ibex.server.envelope import encode_error

ParserFault = Callable[[web.BaseRequest, RequestError], Awaitable[Any]]


class EdgeProtocol(RequestHandler):
    """One client connection. `received_at`: when the first byte of the request being read came (monotonic seconds)."""

    __slots__ = ("is_serving", "on_fault", "received_at")

    def __init__(self, manager: "EdgeServer", **kwargs: Any) -> None:
        super().__init__(manager, **kwargs)
        self.received_at = 0.0
        self.is_serving = False
        self.on_fault = manager.on_fault

    def data_received(self, data: bytes) -> None:
        """Stamp the first byte of a request before anything else sees it."""
        if not self.received_at and not self.is_serving:
            self.received_at = perf_counter()
        super().data_received(data)

    def begin_request(self) -> float:
        """The stamp of the request now being handled; one that was pipelined begins when its turn comes."""
        stamp = self.received_at or perf_counter()
        self.is_serving = True
        return stamp

    def end_request(self) -> None:
        """The next byte belongs to the next request."""
        self.is_serving = False
        self.received_at = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether no byte of a request has come since the last answer."""
        return not self.is_serving and not self.received_at

    def is_overdue(self, moment: float, head_seconds: float) -> bool:
        """Whether a head was begun and is still not whole."""
        return not self.is_serving and self.received_at > 0.0 and moment - self.received_at > head_seconds

    def expire(self) -> None:
        """Answer a head that never came, and close."""
        self.received_at = 0.0
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(_late_head())
        self.force_close()

    def _make_error_handler(self, err_info: Any) -> Callable[[web.BaseRequest], Awaitable[Any]]:
        """Bytes that are not HTTP: the envelope instead of aiohttp's page, and nothing of the parser's text."""
        is_too_large = isinstance(err_info.exc, LineTooLong)
        error: RequestError = (
            HeadersTooLarge() if is_too_large else ValidationFailed("The request is not valid HTTP/1.1.")
        )

        async def handle(request: web.BaseRequest) -> Any:
            return await self.on_fault(request, error)

        return handle


class EdgeServer(web.Server):
    """Makes the connections of a worker, and knows them all."""

    protocol_options: ClassVar[dict[str, Any]] = {
        "max_line_size": 16 << 10,
        "max_field_size": 16 << 10,
        "max_headers": 128,
        "lingering_time": 0,
        "access_log": None,
        "auto_decompress": False,
        "keepalive_timeout": 75.0,
    }

    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Awaitable[Any]],
        on_fault: ParserFault,
        *,
        max_connections: int,
        max_per_address: int,
        on_count: Callable[[int], None],
    ) -> None:
        super().__init__(handler, handler_cancellation=True)
        self.on_fault = on_fault
        self._max_connections = max_connections
        self._max_per_address = max_per_address
        self._on_count = on_count
        self._by_address: dict[str, int] = {}
        self.exempt: Callable[[str], bool] = lambda _address: False
        """Whether an address (a trusted proxy's) is not counted by itself."""

    def __call__(self) -> EdgeProtocol:
        return EdgeProtocol(self, loop=self._loop, **self.protocol_options)

    def connection_made(self, handler: RequestHandler, transport: Any) -> None:
        """Count a connection; over a cap it is closed."""
        super().connection_made(handler, transport)
        address = peer_address(transport)
        count = self._by_address[address] = self._by_address.get(address, 0) + 1
        self._on_count(len(self._connections))
        is_over = self._max_per_address and count > self._max_per_address and not self.exempt(address)
        if is_over or len(self._connections) > self._max_connections:
            transport.abort()

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        """Forget a connection."""
        if handler.transport is not None:
            address = peer_address(handler.transport)
            left = self._by_address.get(address, 1) - 1
            if left > 0:
                self._by_address[address] = left
            else:
                self._by_address.pop(address, None)
        super().connection_lost(handler, exc)
        self._on_count(len(self._connections))

    def close_idle(self) -> None:
        """Close the connections that have no request, not even the beginning of one."""
        for connection in self.connections:
            if isinstance(connection, EdgeProtocol) and connection.is_idle:
                connection.force_close()

    def expire_heads(self, head_seconds: float) -> None:
        """Close the connections whose request head is overdue."""
        moment = perf_counter()
        for connection in self.connections:
            if isinstance(connection, EdgeProtocol) and connection.is_overdue(moment, head_seconds):
                connection.expire()


def peer_address(transport: Any) -> str:
    """The address at the other end of a connection; "local" where there is none."""
    if transport is None:
        return "local"
    peer = transport.get_extra_info("peername")
    return str(peer[0]) if isinstance(peer, tuple) else "local"


def _late_head() -> bytes:
    request_id = mint_uuid7()
    body = encode_error(RequestTimeout("The request's head did not arrive in time."), request_id)
    head = (
        f"HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        f"X-Request-ID: {request_id}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
