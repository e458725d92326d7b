"""A client connection at its end, when the client has no manners."""

import logging
import socket
import struct

import pytest

from ibex.server.edge.protocol import EdgeProtocol
from tests.server.conftest import Edge
from tests.waiting import eventually


async def test_a_client_that_resets_before_the_farewell_is_no_error(
    edge: Edge, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As proxies in front do, which have the answer and want no more."""
    client = socket.create_connection(("127.0.0.1", edge.port))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    linger = EdgeProtocol.linger

    async def linger_with_nobody(protocol: EdgeProtocol) -> None:
        client.close()  # the event loop cannot have noticed
        await linger(protocol)

    monkeypatch.setattr(EdgeProtocol, "linger", linger_with_nobody)
    client.send(b"GET / HTTP/9.9\r\n\r\n")
    await eventually(lambda: client.fileno() == -1 and edge.metrics.active_connections.labels().value == 0)

    assert [record.message for record in caplog.records if record.levelno >= logging.ERROR] == []
