"""A provider that sends odd bytes: its request gets a 503, and no byte of it reaches the request after it."""

import asyncio
import base64
import json
from dataclasses import dataclass

import pytest

from tests.server.conftest import Edge
from tests.waiting import eventually

SMUGGLED_BODY = b'{"id":"x","object":"chat.completion","choices":[{"message":{"content":"SMUGGLED"}}]}'
JSON = b"Content-Type: application/json\r\n"
OK = b"HTTP/1.1 200 OK\r\n" + JSON
SMUGGLED = OK + b"Content-Length: %d\r\n\r\n" % len(SMUGGLED_BODY) + SMUGGLED_BODY
"""A whole and proper answer, for whoever takes it for the next one."""

OWN_BODY = SMUGGLED_BODY.replace(b"SMUGGLED", b"FIRST")
LENGTH = b"Content-Length: %d\r\n" % len(OWN_BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"


@dataclass(frozen=True)
class Oddity:
    """What a provider may send."""

    name: str
    sent: bytes
    stays_open: bool = True
    is_streaming: bool = False


ODDITIES = [
    Oddity("nothing", b"", stays_open=False),
    Oddity("no HTTP", b"\x16\x03\x01\x02\x00\x01\x00\xff\xfe garbage \r\n\r\n" + SMUGGLED),
    Oddity("another version", b"HTTP/2.0 200 OK\r\n" + LENGTH + b"\r\n" + OWN_BODY + SMUGGLED),
    Oddity("a status that is no number", b"HTTP/1.1 OK 200\r\n" + LENGTH + b"\r\n" + OWN_BODY + SMUGGLED),
    Oddity("half a head", OK + b"Content-Len", stays_open=False),
    Oddity("a head without end", OK + b"X-Large: " + b"x" * (70 << 10)),
    Oddity("a field without a colon", OK + b"odd\r\n" + LENGTH + b"\r\n" + OWN_BODY + SMUGGLED),
    Oddity("a zero byte in a field", OK + b"X-Odd: a\0b\r\n" + LENGTH + b"\r\n" + OWN_BODY + SMUGGLED),
    Oddity("a folded field", OK + b"X-Odd: a\r\n Content-Length: 1\r\n" + LENGTH + b"\r\n" + OWN_BODY + SMUGGLED),
    Oddity("two lengths", OK + LENGTH + b"Content-Length: 2\r\n\r\n" + OWN_BODY + SMUGGLED),
    Oddity("a negative length", OK + b"Content-Length: -1\r\n\r\n" + OWN_BODY + SMUGGLED),
    Oddity("a length with a sign", OK + LENGTH.replace(b": ", b": +") + b"\r\n" + OWN_BODY + SMUGGLED),
    Oddity("a length and chunks", OK + LENGTH + CHUNKED + b"\r\n0\r\n\r\n" + SMUGGLED),
    Oddity("a coding nobody asked for", OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n" + SMUGGLED),
    Oddity("a coded body", OK + b"Content-Encoding: br\r\n" + LENGTH + b"\r\n" + OWN_BODY, stays_open=False),
    Oddity("a body shorter than its length", OK + LENGTH + b"\r\n" + OWN_BODY[:9], stays_open=False),
    Oddity("a chunk without a size", OK + CHUNKED + b"\r\nxyz\r\n" + OWN_BODY + b"\r\n0\r\n\r\n" + SMUGGLED),
    Oddity("a chunk longer than its size", OK + CHUNKED + b"\r\n2\r\n" + OWN_BODY + b"\r\n0\r\n\r\n" + SMUGGLED),
    Oddity("chunks without an end", OK + CHUNKED + b"\r\n2\r\n{}\r\n", stays_open=False),
    Oddity("another protocol", b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: odd\r\n\r\n" + SMUGGLED),
    Oddity("interim answers alone", b"HTTP/1.1 100 Continue\r\n\r\n" * 20),
    Oddity("no body", b"HTTP/1.1 204 No Content\r\n\r\n" + SMUGGLED),
    Oddity("a stream's garbage head", b"garbage\r\n\r\n" + SMUGGLED, is_streaming=True),
    Oddity("a stream with two lengths", OK + LENGTH + b"Content-Length: 2\r\n\r\n" + SMUGGLED, is_streaming=True),
]


async def ask(edge: Edge, oddity: Oddity) -> tuple[int, bytes]:
    """Have the provider send it; the connection it came over must be closed, though the provider keeps it open."""
    controls = {
        "raw": base64.b64encode(oddity.sent).decode(),
        "raw_end": "keep" if oddity.stays_open else "close",
    }
    status, _, content = await edge.chat(sandbox=controls, stream=oddity.is_streaming)
    await eventually(lambda: edge.sandbox.open_connections == 0)
    return status, content


async def test_odd_bytes_cost_their_own_request_and_no_other(edge: Edge, subtests: pytest.Subtests) -> None:
    for oddity in ODDITIES:
        with subtests.test(oddity.name):
            status, content = await ask(edge, oddity)
            assert (status, json.loads(content)["error"]["code"]) == (503, "PROVIDER_UNAVAILABLE")
            assert b"SMUGGLED" not in content
            await check_next(edge)


@pytest.mark.parametrize("surplus", [b"x", b"\r\n", SMUGGLED], ids=["a byte", "a line's end", "an answer"])
@pytest.mark.parametrize("framing", ["length", "chunks"])
async def test_bytes_beyond_an_answers_end_reach_nobody(edge: Edge, surplus: bytes, framing: str) -> None:
    chunks = OK + CHUNKED + b"\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(OWN_BODY), OWN_BODY)
    whole = OK + LENGTH + b"\r\n" + OWN_BODY if framing == "length" else chunks
    status, content = await ask(edge, Oddity("surplus", whole + surplus))
    assert (status, content) == (200, OWN_BODY)
    await check_next(edge)


async def check_next(edge: Edge) -> None:
    """Whoever asks next gets an answer to what they asked."""
    status, _, content = await edge.chat()
    assert (status, json.loads(content)["choices"][0]["message"]["content"]) == (200, "IBEX_OK")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_leads_nowhere(edge: Edge, status: int) -> None:
    visitors = []
    canary = await asyncio.start_server(lambda _, writer: visitors.append(writer.close()), "127.0.0.1", 0)
    async with canary:
        address = canary.sockets[0].getsockname()
        location = {"Location": f"http://{address[0]}:{address[1]}/v1/chat/completions"}

        answered, _, _ = await edge.chat(sandbox={"status": status, "headers": location})

        assert answered == 503
        assert len(edge.sandbox.requests) == 1
        assert visitors == []
