"""Connections that were made before a stop and that nobody has accepted: they are served, not reset."""

import asyncio
import socket

from ibex.server.worker import Sockets
from tests.server.conftest import Edge


async def test_a_request_that_waits_to_be_accepted_is_answered_by_the_worker_that_stops(edge: Edge) -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setblocking(False)
    sockets = Sockets([listening])
    address = listening.getsockname()
    connections = [await asyncio.open_connection(*address) for _ in range(3)]
    for _, writer in connections:
        writer.write(b"GET /health HTTP/1.1\r\nHost: ibex\r\n\r\n")

    edge.server.stop_accepting(sockets.take_queued())
    sockets.close()
    answers = asyncio.gather(*(reader.read() for reader, _ in connections))
    await edge.server.drain(5)

    for answer in await answers:
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"Connection: close" in answer
    for _, writer in connections:
        writer.close()
