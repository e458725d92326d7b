"""A worker for tests: the real process around a small HTTP server, so that the supervisor is tried alone."""

import asyncio
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from aiohttp import web

from ibex.config import Settings
from ibex.errors import OperatorError
from ibex.server.control import Control
from ibex.server.messages import Unfinished
from ibex.server.worker import Server, main
from ibex.telemetry import Metrics


class SmallServer:
    """Says who it is, shares and remembers what was shared, counts, and can be slow."""

    def __init__(self, slot: int, metrics: Metrics, control: Control) -> None:
        self._slot = slot
        self._metrics = metrics
        self._control = control
        self._heard: list[str] = []
        self._handler = web.Server(self._answer)
        self._slow = 0
        self._is_leaving = False
        self._listeners: dict[socket.socket, asyncio.Server] = {}
        control.read_facts = lambda: {"listeners": len(self._listeners), "in_flight": self._slow}
        control.on_share = lambda payload: self._heard.append(payload.decode())

    async def start(self, sockets: list[socket.socket]) -> None:
        for sock in sockets:
            await self.accept_on(sock)

    async def accept_on(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        self._listeners[sock] = await loop.create_server(self._handler, sock=sock, backlog=4096)

    async def release(self, sock: socket.socket) -> None:
        self._listeners.pop(sock).close()

    def withdraw(self) -> None:
        self._is_leaving = True

    @property
    def unfinished(self) -> Unfinished:
        return Unfinished(self._slow, 0)

    def stop_accepting(self, queued: Iterable[socket.socket]) -> None:
        for listener in self._listeners.values():
            listener.close()
        for sock in queued:
            sock.close()

    async def drain(self, seconds: float) -> None:
        deadline = asyncio.get_running_loop().time() + seconds
        while self._slow and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110 (small)
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        for listener in self._listeners.values():
            listener.close()
        await self._handler.shutdown(0.1)

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        match request.path:
            case "/share":
                self._control.share(request.query_string.encode(), key=request.query_string.partition("=")[0].encode())
            case "/heard":
                return web.json_response(self._heard)
            case "/count":
                self._metrics.requests_total.labels("/count", "GET", "200").inc()
            case "/metrics":
                return web.Response(body=await self._control.metrics_text())
            case "/slow":
                self._slow += 1
                await asyncio.sleep(float(request.query_string))
                self._slow -= 1
            case "/ready":
                return web.Response(status=503 if self._is_leaving else 200)
            case "/hang" if request.query_string == str(self._slot):
                time.sleep(60)  # noqa: ASYNC251 (the point of it)
            case "/v1/chat/completions" if "--open" not in ARGUMENTS:
                return web.Response(status=401)
            case "/environment":
                return web.json_response(dict(os.environ))
        return web.json_response({"slot": self._slot, "pid": os.getpid()}, headers={"Connection": "close"})


@asynccontextmanager
async def open_small_server(settings: Settings, slot: int, metrics: Metrics, control: Control) -> AsyncIterator[Server]:
    if "--broken" in ARGUMENTS or settings.openai_models == ("broken",):
        raise OperatorError("it is broken", hint="Mend it.")
    if "--dead" in ARGUMENTS:
        os._exit(3)
    if "--stuck" in ARGUMENTS or settings.openai_models == ("stuck",):
        await asyncio.Event().wait()
    yield SmallServer(slot, metrics, control)


ARGUMENTS = [argument for argument in sys.argv[1:] if argument in {"--broken", "--dead", "--stuck", "--open"}]

if __name__ == "__main__":
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument not in ARGUMENTS]
    sys.exit(main(open_small_server))
