"""All client connections of one worker: counted, capped, and none left behind."""

from collections.abc import Callable
from time import perf_counter
from typing import Any, Final

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from ibex.server.edge.protocol import MAX_FIELD_BYTES, MAX_FIELDS, EdgeProtocol, Serve

CLOSING_SECONDS = 30.0
"""How long a connection that is closed may take to hand over its last bytes."""

_OPTIONS: Final[dict[str, Any]] = {
    "max_line_size": MAX_FIELD_BYTES,
    "max_field_size": MAX_FIELD_BYTES,
    "max_headers": MAX_FIELDS,
    "lingering_time": 0,
    "access_log": None,
    "auto_decompress": False,
    "keepalive_timeout": 75.0,
}


class EdgeServer(web.Server):
    """Makes the connections of a worker, and knows them all."""

    def __init__(
        self,
        serve: Serve,
        *,
        max_connections: int,
        max_per_address: int,
        on_count: Callable[[int], None],
    ) -> None:
        super().__init__(_nobody, handler_cancellation=True)
        self._serve = serve
        self._max_connections = max_connections
        self._max_per_address = max_per_address
        self._on_count = on_count
        self._open = 0
        self._by_address: dict[str, int] = {}
        self.exempt: Callable[[str], bool] = lambda _address: False
        """Whether an address (a trusted proxy's) is not counted by itself."""

    def __call__(self) -> EdgeProtocol:
        return EdgeProtocol(self, loop=self._loop, serve=self._serve, **_OPTIONS)

    def connection_made(self, handler: RequestHandler, transport: Any) -> None:
        """Count a connection; over a cap it is closed."""
        super().connection_made(handler, transport)
        assert isinstance(handler, EdgeProtocol)  # noqa: S101
        address = handler.address = _peer_address(transport)
        count = self._by_address[address] = self._by_address.get(address, 0) + 1
        self._open += 1
        self._on_count(self._open)
        is_over = self._max_per_address and count > self._max_per_address and not self.exempt(address)
        if is_over or self._open > self._max_connections:
            transport.abort()

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        """Forget a connection."""
        super().connection_lost(handler, exc)
        assert isinstance(handler, EdgeProtocol)  # noqa: S101
        left = self._by_address[handler.address] - 1
        if left:
            self._by_address[handler.address] = left
        else:
            del self._by_address[handler.address]
        self._open -= 1
        self._on_count(self._open)

    def close_idle(self) -> None:
        """Close the connections that have no request, not even the beginning of one."""
        for connection in self.connections:
            if isinstance(connection, EdgeProtocol) and connection.is_idle and not connection.has_unread:
                connection.force_close()

    def count_untaken(self) -> int:
        """Answers that have ended here, and whose last bytes the client has not taken."""
        return sum(
            not connection.is_serving and transport.get_write_buffer_size() > 0
            for connection, transport in self._connections.items()
            if isinstance(connection, EdgeProtocol)
        )

    def interrupt(self) -> None:
        """Cancel what is being served."""
        for connection in self.connections:
            if isinstance(connection, EdgeProtocol) and connection.is_serving:
                connection.interrupt()

    def expire(self, head_seconds: float) -> None:
        """Refuse heads that are overdue, and give up connections whose client does not take the last bytes."""
        moment = perf_counter()
        for connection, transport in list(self._connections.items()):
            assert isinstance(connection, EdgeProtocol)  # noqa: S101
            if not transport.is_closing():
                connection.expire_head(moment, head_seconds)
            elif not connection.closing_since:
                connection.closing_since = moment
            elif moment - connection.closing_since > CLOSING_SECONDS:
                transport.abort()


async def _nobody(_request: web.BaseRequest) -> web.StreamResponse:
    """aiohttp wants a handler; the connections serve by themselves."""
    raise NotImplementedError


def _peer_address(transport: Any) -> str:
    peer = transport.get_extra_info("peername")
    return str(peer[0]) if isinstance(peer, tuple) else "local"
