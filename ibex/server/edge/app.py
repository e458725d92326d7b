"""The HTTP server of one worker: the chain from a listening socket to the pipeline, started and drained."""

import asyncio
import socket
from collections.abc import Iterable
from typing import NoReturn

import aiohttp
from aiohttp import http_parser

from ibex.errors import ConfigurationError, ServiceDegraded
from ibex.pipeline.chat import ChatPipeline
from ibex.runtime import Worker
from ibex.server.control import Control
from ibex.server.edge.connections import EdgeServer
from ibex.server.edge.lookups import Lookups
from ibex.server.edge.middleware import Middleware
from ibex.server.edge.ops import Operations
from ibex.server.edge.protocol import EdgeProtocol
from ibex.server.edge.routes import Routes
from ibex.server.handover import Handover
from ibex.server.messages import Unfinished
from ibex.telemetry import AccessLog, Tracing, measure_loop_lag, spawn

OLDEST_AIOHTTP = (3, 14, 5)
BACKLOG = 4096
LINGER_SECONDS = 0.25
"""How long an idle connection is kept after the drain has begun, so that a request already on its way is answered."""
INTERRUPTION_SECONDS = 0.5
"""How long a reply that is cut off may take to say so: its turn has to be in the journal first."""
HANDOVER_SECONDS = 2.0
"""How long a draining worker waits for each connection to be idle before it ends those that never are."""


class HttpServer:
    """Serves HTTP on the sockets the supervisor owns."""

    def __init__(self, worker: Worker, control: Control) -> None:
        """Raises ConfigurationError when aiohttp is too old, or lacks its C parser."""
        _check_aiohttp()
        settings = worker.settings
        name = f"worker {worker.slot}"
        self._metrics = worker.metrics
        self._settings = settings
        self._control = control
        self._tracing = Tracing(settings, name, worker.metrics)
        self._access_log = AccessLog(settings, name)
        chat = ChatPipeline(
            authenticator=worker.authenticator,
            rate_limiter=worker.rate_limiter,
            directive_book=worker.directive_book,
            router=worker.router,
            idempotency=worker.idempotency,
            journal=worker.journal,
            metrics=worker.metrics,
            captures_content=settings.capture_content,
        )
        self._operations = Operations(worker, control)
        lookups = Lookups(worker.authenticator, worker.models)
        routes = Routes(settings, chat, lookups, self._operations)
        self._middleware = Middleware(settings, routes, worker.metrics, self._tracing, self._access_log)
        self._edge = EdgeServer(
            self._middleware.serve,
            max_connections=settings.max_connections,
            max_per_address=settings.max_connections_per_address,
            on_count=worker.metrics.active_connections.set,
        )
        self._edge.exempt = self._middleware.is_trusted
        self._listeners: dict[int, asyncio.Server] = {}
        self._sweeper: asyncio.Task[None] | None = None
        self._lag: asyncio.Task[NoReturn] | None = None

    @property
    def in_flight(self) -> int:
        """Requests whose answer has not ended."""
        return len(self._middleware.replies)

    @property
    def streams(self) -> int:
        """Those of them that are streams."""
        return sum(reply.is_stream for reply in self._middleware.replies)

    @property
    def unfinished(self) -> Unfinished:
        """Requests that are not answered yet, or whose answer's last bytes the client has not taken."""
        streams = self.streams
        return Unfinished(self.in_flight - streams + self._edge.count_untaken(), streams)

    def withdraw(self) -> None:
        """Serve on, say at /ready that this will end, and have clients find their next connection elsewhere."""
        self._middleware.is_draining = self._operations.is_draining = True

    async def start(self, sockets: list[socket.socket]) -> None:
        """Accept connections on these sockets."""
        for sock in sockets:
            await self.accept_on(sock)
        self._sweeper = spawn(self._expire_heads(), name="head deadlines")
        self._lag = spawn(measure_loop_lag(self._metrics.event_loop_lag_seconds), name="loop lag")
        if self._control.handover is not None:
            self._control.handover.take(self._take_over)

    async def accept_on(self, sock: socket.socket) -> None:
        """Accept connections on this socket too."""
        loop = asyncio.get_running_loop()
        self._listeners[sock.fileno()] = await loop.create_server(self._edge, sock=sock, backlog=BACKLOG)

    async def release(self, sock: socket.socket) -> None:
        """Accept no more connections on this socket; those there are go on."""
        listener = self._listeners.pop(sock.fileno(), None)
        if listener is not None:
            listener.close()

    def stop_accepting(self, queued: Iterable[socket.socket]) -> None:
        """Accept no more connections but these, which wait to be accepted."""
        for listener in self._listeners.values():
            listener.close()
        self._listeners.clear()
        for sock in queued:
            self._take_over(sock)

    async def drain(self, seconds: float) -> None:
        """Let every request be answered, and return when no connection is left or time is up."""
        deadline = asyncio.get_running_loop().time() + seconds
        handover = self._control.handover
        if self._control.has_successor and handover is not None:
            await self._hand_over(handover, deadline)
        self._middleware.is_draining = self._operations.is_draining = True
        await asyncio.sleep(min(LINGER_SECONDS, seconds))
        while self._edge.connections and asyncio.get_running_loop().time() < deadline:
            self._edge.close_idle()
            await asyncio.sleep(0.02)

    async def _hand_over(self, handover: Handover, deadline: float) -> None:
        """Give each connection to the successor at a moment at which it is idle, until none is left.

        One that is never seen idle is told at last to end with its next answer, as all are when the node stops.
        """
        loop = asyncio.get_running_loop()
        handover.stop_taking()
        last_answers_from = loop.time() + HANDOVER_SECONDS
        while self._edge.connections and loop.time() < deadline and self._control.has_successor:
            for connection in self._edge.connections:
                if isinstance(connection, EdgeProtocol) and connection.is_at_rest and handover.give(connection.fd):
                    connection.force_close()
            await asyncio.sleep(0.005)
            self._middleware.is_draining = loop.time() > last_answers_from

    def _take_over(self, sock: socket.socket) -> None:
        async def serve() -> None:
            sock.setblocking(False)
            await asyncio.get_running_loop().connect_accepted_socket(self._edge, sock)

        _ = spawn(serve(), name="connection taken")

    async def close(self) -> None:
        """End what is left, at once, and say so to whoever waits for it."""
        for task in (self._sweeper, self._lag):
            if task is not None:
                task.cancel()
        for listener in self._listeners.values():
            listener.close()
        await self._interrupt()
        await self._edge.shutdown(0.1)
        self._access_log.flush()
        await self._tracing.close()

    async def _interrupt(self) -> None:
        replies, deadline = self._middleware.replies, asyncio.get_running_loop().time() + INTERRUPTION_SECONDS
        self._middleware.interrupt(ServiceDegraded("ibex stops here, and cuts this reply off. Ask again."))
        self._edge.interrupt()
        while replies and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110 - they end in their own tasks
            await asyncio.sleep(0.01)

    async def _expire_heads(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self._settings.head_seconds / 4))
            self._edge.expire(self._settings.head_seconds)


def _check_aiohttp() -> None:
    version = tuple(int(part) for part in aiohttp.__version__.split(".")[:3] if part.isdigit())
    if version < OLDEST_AIOHTTP:
        wanted = ".".join(map(str, OLDEST_AIOHTTP))
        raise ConfigurationError(f"aiohttp {aiohttp.__version__} is too old for a safe edge; {wanted} is needed.")
    if http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
        raise ConfigurationError("aiohttp was installed without its C parser; ibex does not serve without it.")
