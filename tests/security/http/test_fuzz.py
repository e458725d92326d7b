"""Bytes nobody has thought of: HTTP's own words put together at random, and random bytes, sent to a real connection."""

import asyncio
import logging
import socket
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.security.http.corpus import make_parts
from tests.security.http.raw_client import check_response, responses
from tests.server.conftest import Edge
from tests.waiting import eventually

WORDS = [
    b"GET ", b"POST ", b"CONNECT ", b"OPTIONS ", b"/health", b"/v1/chat/completions", b"*", b"http://a/health",
    b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", b" HTTP/2.0\r\n", b"Host: ibex\r\n", b"Host: a b\r\n", b"Content-Length: ",
    b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding:", b"Connection: close\r\n", b"Connection: keep-alive\r\n",
    b"Connection: upgrade\r\nUpgrade: websocket\r\n", b"Expect: 100-continue\r\n", b"Content-Encoding: gzip\r\n",
    b"0\r\n", b"1\r\n", b"5\r\nhello\r\n", b"0\r\n\r\n", b"ffffffffffffffff\r\n", b"18446744073709551615\r\n", b"\r\n",
    b"\n", b"\r", b"\r\n\r\n", b" ", b"\t", b"\x00", b":", b";", b"chunked", b",", b"{}", b"A: b\r\n", b"\xff",
    b"a" * 20_000,
]  # fmt: skip


@pytest.mark.parametrize("edge", [{"log_level": "debug"}], indirect=True)
async def test_whatever_is_sent_is_answered_or_closed_and_nothing_breaks(
    edge: Edge, caplog: pytest.LogCaptureFixture
) -> None:
    auth = make_parts(edge.tenant.bearer, str(edge.tenant.agent_id))["auth"].encode() + b"\r\n"
    words = st.sampled_from([*WORDS, auth]) | st.binary(max_size=40)

    @settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(pieces=st.lists(words, min_size=1, max_size=24), cuts=st.lists(st.integers(0, 400), max_size=3))
    def attack(pieces: list[bytes], cuts: list[int]) -> None:
        data = b"".join(pieces)
        received = _send(edge.port, [data[start:end] for start, end in pairwise([0, *sorted(cuts), len(data)])])
        for response in responses(received):
            check_response(response, is_head=False)

    await asyncio.to_thread(attack)

    await eventually(lambda: edge.metrics.active_connections.labels().value == 0)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert edge.sandbox.requests.total == 0
    assert (await edge.chat())[0] == 200


def _send(port: int, pieces: list[bytes]) -> bytes:
    """Send, hang up, and read until the other side has hung up too: patience is all it may cost."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        received = bytearray()
        try:
            for piece in pieces:
                sock.sendall(piece)
            sock.settimeout(0.005)
            while data := sock.recv(1 << 16):
                received += data
        except TimeoutError:
            sock.settimeout(10)
            sock.shutdown(socket.SHUT_WR)
            while data := sock.recv(1 << 16):
                received += data
        except ConnectionError:
            pass
        return bytes(received)
