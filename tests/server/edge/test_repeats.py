"""A head that a connection sends again is taken for what it was, and for nothing that it is not."""

import asyncio
import json
import re
from collections.abc import Callable, Iterator

import pytest
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_parser import HttpRequestParser
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict

from ibex.server.edge.head import RequestHead
from ibex.server.edge.repeats import RepeatedHead
from tests.security.http.raw_client import Connection, responses
from tests.server.conftest import Edge

HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: ibex\r\nContent-Length: 2\r\nContent-Type: application/json\r\n\r\n"
)
Read = Callable[[bytes], RequestHead]
DIGITS = re.compile(rb"(?<=Content-Length: )\d+")


@pytest.fixture
def read() -> Iterator[Read]:
    """Reads the head of a request's bytes through the real parser."""
    loop = asyncio.new_event_loop()

    def read_head(data: bytes) -> RequestHead:
        [(message, _)], _, _ = HttpRequestParser(BaseProtocol(loop), loop, 2**16).feed_data(data)
        return RequestHead.read(message)

    yield read_head
    loop.close()


def learn(read: Read, data: bytes) -> RepeatedHead | None:
    return RepeatedHead.learn(data, read(data))


def test_a_head_learnt_is_found_with_every_length(read: Read) -> None:
    repeated = learn(read, HEAD + b"{}")
    assert repeated is not None

    for size in (1, 2, 9, 10, 4321, 1_000_000):
        found = repeated.find(HEAD.replace(b": 2", b": %d" % size) + b"x" * size)
        assert found is not None
        head, body = found
        assert (body.size, body.read_nowait()) == (size, b"x" * size)
        assert head.content_length is None
        assert "Content-Length" not in head.headers


def test_ids_may_change_and_are_read_each_time(read: Read) -> None:
    ids = b"traceparent: %b\r\nX-Request-Id: %b\r\nidempotency-key: %b\r\n\r\n"
    head = HEAD[:-2] + ids
    repeated = learn(read, head % (b"a-1", b"r-1", b"k-1") + b"{}")
    assert repeated is not None

    found = repeated.find(head % (b"b-22", b"r-2", b"~!#") + b"{}")
    assert found is not None
    wanted = CIMultiDict(read(head % (b"b-22", b"r-2", b"~!#") + b"{}").headers)
    del wanted["Content-Length"]
    assert CIMultiDict(found[0].headers) == wanted
    for value in (b"", b" ", b"a b", b"a\t", b"\x7f", b"\xff", b"a\nb: c", b"x" * 65):
        assert repeated.find(head % (b"a-1", value, b"k-1") + b"{}") is None


@pytest.mark.parametrize(
    "data",
    [
        HEAD + b"{",
        HEAD + b"{} ",
        HEAD + b"{}" + HEAD + b"{}",
        HEAD.replace(b": 2", b": 02") + b"{}",
        HEAD.replace(b": 2", b": +2") + b"{}",
        HEAD.replace(b": 2", b": 0"),
        HEAD.replace(b": 2", b": ") + b"{}",
        HEAD.replace(b": 2", b": 2 ") + b"{}",
        HEAD.replace(b": 2", b": 2, 2") + b"{}",
        HEAD.replace(b": 2", b": 12345678") + b"x" * 12_345_678,
        HEAD.replace(b"ibex", b"Ibex") + b"{}",
        HEAD.replace(b"\r\n\r\n", b"\r\nA: b\r\n\r\n") + b"{}",
        b"\r\n" + HEAD + b"{}",
        HEAD[:60],
        b"",
    ],
)
def test_whatever_differs_goes_to_the_parser(read: Read, data: bytes) -> None:
    repeated = learn(read, HEAD + b"{}")
    assert repeated is not None
    assert repeated.find(data) is None


@pytest.mark.parametrize(
    "data",
    [
        HEAD.replace(b"1.1", b"1.0") + b"{}",
        HEAD.replace(b"Host: ibex", b"Host: ibex\r\nConnection: close") + b"{}",
        HEAD.replace(b"Host: ibex", b"Host: ibex\r\nExpect: 100-continue") + b"{}",
        HEAD.replace(b"Host: ibex", b"Host: a b") + b"{}",
        HEAD.replace(b"Content-Length: 2", b"Content-Length:  2") + b"{}",
        HEAD.replace(b"Content-Length: 2", b"Transfer-Encoding: chunked") + b"2\r\n{}\r\n0\r\n\r\n",
        HEAD.replace(b"POST", b"GET") + b"{}",
        HEAD.replace(b": 2", b": 0"),
        HEAD.replace(b"Host: ibex", b"Host: ibex\r\ntraceparent: a\r\nTraceparent: b") + b"{}",
        b"\r\n" + HEAD + b"{}",
    ],
)
def test_a_head_that_needs_the_parser_is_not_learnt(read: Read, data: bytes) -> None:
    assert learn(read, data) is None


async def test_a_connection_parses_the_same_head_once(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []
    read_head = RequestHead.read
    monkeypatch.setattr(RequestHead, "read", lambda *args: parsed.append(1) or read_head(*args))
    connection = await Connection.open(edge.port)

    texts = ["one", "another, longer", "x" * 4000]
    for text in texts:
        body = {**edge.body, "messages": [{"role": "user", "content": text}]}
        assert await ask(connection, edge.raw_request(json.dumps(body).encode())) == [200]
    connection.close()

    assert len(parsed) == 1
    assert [json.loads(seen.body)["messages"][-1]["content"] for seen in edge.sandbox.requests.last()] == texts


async def test_the_next_head_may_begin_before_a_repeated_request_is_served(edge: Edge) -> None:
    """A client that does not wait: its bytes come in two reads of one tick."""
    connection = await Connection.open(edge.port)
    request = edge.raw_request()
    assert await ask(connection, request) == [200]
    (server_side,) = edge.server._edge.connections

    server_side.data_received(request)
    server_side.data_received(request[:40])
    connection.received.clear()
    connection.writer.write(request[40:])
    while len(seen := responses(bytes(connection.received))) < 2 and await connection.read_on():
        pass
    connection.close()

    assert [response.status for response in seen] == [200, 200]


@pytest.mark.parametrize("edge", [{"max_body_bytes": 1024}], indirect=True)
async def test_a_declared_size_is_judged_first_on_a_repeated_head_too(edge: Edge) -> None:
    connection = await Connection.open(edge.port)
    request = edge.raw_request().replace(edge.tenant.bearer.encode(), b"ibex_pat_nobodys")
    length = int(DIGITS.findall(request)[0])

    assert await ask(connection, request) == [401]
    assert await ask(connection, DIGITS.sub(b"1025", request) + b" " * (1025 - length)) == [413]
    connection.close()


async def test_mutants_of_a_repeated_request_fare_as_on_a_new_connection(edge: Edge) -> None:
    request = edge.raw_request(headers="X-Request-ID: a\r\ntraceparent: b\r\n")
    loop = asyncio.get_running_loop()
    places = st.integers(0, len(request) - 1) | st.integers(*DIGITS.search(request).span())  # type: ignore[union-attr]
    pieces = st.sampled_from([b"", b"0", b"1", b"\r\n", b"\r", b" ", b":", b"\x00", request, b"GET / HTTP/1.1\r\n\r\n"])

    @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(start=places, removed=st.integers(0, 3), inserted=pieces)
    def compare(start: int, removed: int, inserted: bytes) -> None:
        mutant = request[:start] + inserted + request[start + removed :]
        fates = asyncio.run_coroutine_threadsafe(meet(mutant), loop).result(20)
        assert fates[0] == fates[1]

    async def meet(mutant: bytes) -> list[list[int]]:
        fates = []
        for learns in (True, False):
            connection = await Connection.open(edge.port)
            if learns:
                assert await ask(connection, request) == [200]
                connection.received.clear()
            connection.writer.write(mutant)
            connection.writer.write_eof()
            while await connection.read_on():
                pass
            fates.append([response.status for response in responses(bytes(connection.received))])
            connection.close()
        return fates

    await asyncio.to_thread(compare)


async def ask(connection: Connection, request: bytes) -> list[int]:
    """The statuses of what comes back to these bytes, written at once."""
    connection.received.clear()
    connection.writer.write(request)
    while not (seen := responses(bytes(connection.received))) and await connection.read_on():
        pass
    for response in seen:
        assert json.loads(response.body)
    return [response.status for response in seen]
