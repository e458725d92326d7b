"""Clients that take their time: heads and bodies that trickle, replies nobody reads, and room for everybody else."""

import asyncio
import json
import socket
from collections.abc import Iterator

import pytest

from ibex.domain.turns import Outcome
from ibex.server.edge import connections
from tests.security.http.raw_client import Connection, byte_by_byte, converse, responses
from tests.server.conftest import Edge
from tests.waiting import eventually

QUICK = {"head_seconds": 0.2, "body_seconds": 0.6}
UNREAD = {"slow_client_seconds": 0.3}


def trickle(start: bytes, piece: bytes = b"a", *, gap: float = 0.03) -> Iterator[bytes | float]:
    """Something, and then a little more, for ever."""
    yield start
    while True:
        yield gap
        yield piece


@pytest.mark.parametrize("edge", [QUICK], indirect=True)
@pytest.mark.parametrize(
    "start",
    [
        b"G",
        b"GET /health HTTP/1.1\r\nHost: ibex\r\nA: ",
        b"\r\nGET /health HTTP/1.1\r\nHost: ibex\r\nA: ",
        b"GET /health HTTP/1.1\r\nHost: ibex\r\n\r\nGET /health HTTP/1.1\r\nA: ",
    ],
)
async def test_a_head_that_trickles_is_refused(edge: Edge, start: bytes) -> None:
    answers = frozenset({"408 closed", "200 408 closed", "400 closed"})

    transcript = await converse(edge.port, trickle(start), answers, is_head=False)

    assert transcript == (
        "200 408 closed" if start.count(b"\r\n\r\n") else "400 closed" if start == b"G" else "408 closed"
    )


@pytest.mark.parametrize("edge", [QUICK], indirect=True)
async def test_half_a_head_and_silence_is_refused_behind_an_answer_too(edge: Edge) -> None:
    whole = b"GET /health HTTP/1.1\r\nHost: ibex\r\n\r\n"
    answers = frozenset({"200 408 closed"})

    assert await converse(edge.port, iter([whole, 0.05, whole[:10]]), answers, is_head=False) == "200 408 closed"


@pytest.mark.parametrize("edge", [QUICK], indirect=True)
async def test_silence_is_no_slow_head(edge: Edge) -> None:
    connection = await Connection.open(edge.port)
    await asyncio.sleep(0.5)

    connection.writer.write(b"\r\n")
    await asyncio.sleep(0.5)
    connection.writer.write(b"GET /health HTTP/1.1\r\nHost: ibex\r\n\r\n")
    await connection.read_on()

    assert [response.status for response in responses(bytes(connection.received))] == [200]
    connection.close()


@pytest.mark.parametrize("edge", [QUICK], indirect=True)
@pytest.mark.parametrize("framing", ["Content-Length: 1000", "Transfer-Encoding: chunked"])
async def test_a_body_that_stalls_is_refused(edge: Edge, framing: str) -> None:
    start = f"{_head(edge)}{framing}\r\n\r\n" + ("5\r\n" if "chunked" in framing else "") + "{"

    transcript = await converse(edge.port, iter([start.encode()]), frozenset({"408 closed"}), is_head=False)

    assert transcript == "408 closed"
    assert not edge.sandbox.requests


@pytest.mark.parametrize("edge", [{"body_seconds": 3.0}], indirect=True)
async def test_a_body_below_the_least_rate_is_refused_long_before_its_deadline(edge: Edge) -> None:
    pieces = 0

    def counted() -> Iterator[bytes | float]:
        nonlocal pieces
        for piece in trickle(f"{_head(edge)}Content-Length: 1000\r\n\r\n".encode(), b" ", gap=0.05):
            pieces += isinstance(piece, bytes)
            yield piece

    transcript = await converse(edge.port, counted(), frozenset({"408 closed"}), is_head=False)

    assert transcript == "408 closed"
    assert pieces < 3.0 / 0.05


@pytest.mark.parametrize("edge", [{"body_seconds": 0.6, "body_bytes_per_second": 100}], indirect=True)
async def test_a_body_that_comes_in_bits_but_in_time_is_served(edge: Edge) -> None:
    data = edge.raw_request()

    assert await converse(edge.port, byte_by_byte(data), frozenset({"200 open"}), is_head=False) == "200 open"


async def test_a_refusal_is_read_by_a_client_that_is_still_sending(edge: Edge) -> None:
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: ibex\r\nContent-Type: application/json\r\n"
    megabytes = 30
    data = f"{head}Content-Length: {megabytes << 20}\r\n\r\n".encode() + bytes(megabytes << 20)
    reader, writer = await edge.open_raw()

    writer.write(data)  # without reading a byte until all is gone
    await writer.drain()
    received = await reader.read(-1)

    assert received.startswith(b"HTTP/1.1 413 ")
    assert b"PAYLOAD_TOO_LARGE" in received
    writer.close()


async def test_a_client_is_asked_for_the_body_it_announced(edge: Edge) -> None:
    request = edge.raw_request(headers="Expect: 100-continue\r\n")
    head, separator, body = request.partition(b"\r\n\r\n")
    reader, writer = await edge.open_raw()

    writer.write(head + separator)
    interim = await reader.readuntil(b"\r\n\r\n")
    writer.write(body)
    final = await reader.readuntil(b"\r\n\r\n")

    assert interim == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert final.startswith(b"HTTP/1.1 200 ")
    writer.close()


@pytest.mark.parametrize("edge", [UNREAD], indirect=True)
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_takes_nothing_of_its_reply_has_left(edge: Edge, stream: bool) -> None:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", edge.port))
    large = {"events": 4000, "event_bytes": 16 << 10} if stream else {"text": "x" * (500 << 10)}
    body = {**edge.body, "stream": stream, "n": 1 if stream else 24, "metadata": {"sandbox": large}}

    await asyncio.get_running_loop().sock_sendall(client, edge.raw_request(json.dumps(body).encode()))

    await eventually(edge.turns)
    await eventually(lambda: edge.metrics.active_connections.labels().value == 0)
    assert edge.sandbox.open_connections == 0 or not stream
    if stream:
        turn = edge.last_turn()
        assert (turn.outcome, turn.is_complete) == (Outcome.CLIENT_DISCONNECT, False)
    client.close()


@pytest.mark.parametrize("edge", [QUICK], indirect=True)
async def test_a_closed_connection_whose_client_takes_nothing_is_given_up(
    edge: Edge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "CLOSING_SECONDS", 0.1)
    connection = await Connection.open(edge.port)
    await eventually(lambda: edge.server._edge.connections)
    [handler] = edge.server._edge.connections

    handler.transport.write(bytes(20 << 20))
    handler.force_close()

    await eventually(lambda: edge.metrics.active_connections.labels().value == 0)
    connection.close()


async def test_what_is_pipelined_behind_a_slow_request_waits_in_the_socket(edge: Edge) -> None:
    slow = json.dumps({**edge.body, "metadata": {"sandbox": {"delay_ms": 60_000}}}).encode()
    connection = await Connection.open(edge.port)
    connection.writer.write(edge.raw_request(slow))
    await eventually(lambda: edge.sandbox.open_connections == 1)
    [handler] = edge.server._edge.connections

    flood = edge.raw_request(b" " * (200 << 10))
    for _ in range(150):
        connection.writer.write(flood)
    before = -1
    while (left := connection.writer.transport.get_write_buffer_size()) != before:
        before = left
        await asyncio.sleep(0.2)

    assert left > 0
    assert handler._queued_bytes <= 1 << 20
    assert edge.sandbox.requests.total == 1
    connection.close()


@pytest.mark.parametrize("edge", [{"max_connections": 3}], indirect=True)
async def test_a_connection_beyond_the_cap_is_closed_and_room_is_given_back(edge: Edge) -> None:
    held = [await Connection.open(edge.port) for _ in range(3)]
    await eventually(lambda: edge.metrics.active_connections.labels().value == 3)

    beyond = await Connection.open(edge.port)
    assert not await beyond.read_on()
    beyond.close()
    held[0].close()
    await eventually(lambda: edge.metrics.active_connections.labels().value == 2)

    assert await _ask(edge) == [200]
    for connection in held:
        connection.close()


@pytest.mark.parametrize("edge", [{"max_connections_per_address": 2}], indirect=True)
async def test_an_address_has_its_places_back_however_its_connections_ended(edge: Edge) -> None:
    for last in (b"GET /health HTTP/1.1\r\nHost: ibex\r\nConnection: close\r\n\r\n", b"garbage\r\n\r\n", b"GET") * 3:
        connection = await Connection.open(edge.port)
        connection.writer.write(last)
        if last != b"GET":
            await connection.read_on()
        connection.close()
        await eventually(lambda: edge.metrics.active_connections.labels().value == 0)

    held = [await Connection.open(edge.port) for _ in range(2)]
    await eventually(lambda: edge.metrics.active_connections.labels().value == 2)
    beyond = await Connection.open(edge.port)
    assert not await beyond.read_on()
    for connection in (*held, beyond):
        connection.close()


@pytest.mark.parametrize(
    "edge", [{"max_connections_per_address": 1, "trusted_proxies": ("127.0.0.0/8",)}], indirect=True
)
async def test_a_trusted_proxy_may_have_as_many_connections_as_it_likes(edge: Edge) -> None:
    held = [await Connection.open(edge.port) for _ in range(4)]

    assert await _ask(edge) == [200]
    assert (
        await converse(edge.port, iter([b"no HTTP\r\n\r\n"]), frozenset({"400 closed"}), is_head=False) == "400 closed"
    )
    for connection in held:
        connection.close()


async def test_a_client_that_leaves_before_its_answer_is_counted_as_one_that_left(edge: Edge) -> None:
    left = edge.metrics.requests_total.labels("chat", "POST", "499")
    for data in (edge.raw_request()[:-5], edge.raw_request(b'{"metadata":{"sandbox":{"delay_ms":60000}},' + _rest())):
        before = left.value
        connection = await Connection.open(edge.port)
        connection.writer.write(data)
        await eventually(lambda: edge.server.in_flight == 1)
        connection.close()
        await eventually(lambda before=before: left.value == before + 1)


def _head(edge: Edge) -> str:
    fields = "".join(f"{name}: {value}\r\n" for name, value in edge.headers().items())
    return f"POST /v1/chat/completions HTTP/1.1\r\nHost: ibex\r\n{fields}"


def _rest() -> bytes:
    return b'"model":"gpt-4o-mini","messages":[{"role":"user","content":"x"}]}'


async def _ask(edge: Edge) -> list[int]:
    connection = await Connection.open(edge.port)
    connection.writer.write(b"GET /health HTTP/1.1\r\nHost: ibex\r\n\r\n")
    await connection.read_on()
    connection.close()
    return [response.status for response in responses(bytes(connection.received))]
