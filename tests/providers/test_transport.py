"""The lean transport against an upstream that says whatever a script says."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from ibex.errors import ProviderTimeout, ProviderUnavailable
from ibex.providers.answer import HIGH_WATER_BYTES, ConnectionCut
from ibex.providers.answer_reader import AnswerInvalid
from ibex.providers.connection import Deadlines
from ibex.providers.transport import ConnectFailed, ConnectTimedOut, Transport
from ibex.telemetry import spawn

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\nhi"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
LONG = Deadlines(connect=20, first_byte=20, idle=20, total=20, keep=20)

UpstreamFor = Callable[..., AbstractAsyncContextManager[Any]]


@asynccontextmanager
async def open_transport(base_url: str, **options: Any) -> AsyncIterator[Transport]:
    transport = Transport(base_url, **{"deadlines": LONG, **options})
    try:
        yield transport
    finally:
        await transport.close()


def post(transport: Transport) -> bytes:
    return transport.prepare("POST", "/chat/completions", [(b"Accept", b"application/json")])


async def ask(transport: Transport, body: bytes = b"{}") -> bytes:
    answer = await transport.send(post(transport), body)
    return await answer.read(1 << 20)


async def answer_all(talk: Any) -> None:
    while True:
        await talk.hear()
        await talk.say(OK)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 (what is waited for has no event)
            await asyncio.sleep(0.002)


async def test_a_request_is_one_head_and_its_body(upstream_for: UpstreamFor) -> None:
    async with upstream_for(answer_all) as upstream, open_transport(upstream.base_url) as transport:
        answer = await transport.send(post(transport), b'{"a": 1}', [(b"traceparent", b"00-x")])
        assert (answer.status, answer.headers) == (200, {"content-type": "application/json"})
        assert await answer.read(100) == b"hi"
        authority = upstream.base_url.removeprefix("http://").removesuffix("/v1").encode()
        assert upstream.requests == [
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: " + authority + b"\r\nAccept: application/json\r\n"
            b'traceparent: 00-x\r\nContent-Length: 8\r\n\r\n{"a": 1}'
        ]


async def test_a_connection_is_kept_and_the_latest_one_is_used_first(upstream_for: UpstreamFor) -> None:
    async with upstream_for(answer_all) as upstream, open_transport(upstream.base_url) as transport:
        for _ in range(3):
            assert await ask(transport) == b"hi"
        assert (upstream.connections, transport.idle_connections) == (1, 1)
        await asyncio.gather(*(ask(transport) for _ in range(5)))
        assert (upstream.connections, transport.idle_connections) == (5, 5)


async def test_no_more_connections_are_kept_than_allowed(upstream_for: UpstreamFor) -> None:
    async with upstream_for(answer_all) as upstream, open_transport(upstream.base_url, max_idle=2) as transport:
        await asyncio.gather(*(ask(transport) for _ in range(5)))
        await until(lambda: transport.open_connections == 2)
        assert transport.idle_connections == 2


async def test_an_answer_may_come_byte_by_byte(upstream_for: UpstreamFor) -> None:
    answer = CHUNKED + b"5\r\nhello\r\n0\r\n\r\n"

    async def trickle(talk: Any) -> None:
        while True:
            await talk.hear()
            for position in range(len(answer)):
                await talk.say(answer[position : position + 1])
                await asyncio.sleep(0)

    async with upstream_for(trickle) as upstream, open_transport(upstream.base_url) as transport:
        assert await ask(transport) == b"hello"
        assert await ask(transport) == b"hello"
        assert upstream.connections == 1


async def test_a_stale_connection_is_replaced_once_and_in_silence(upstream_for: UpstreamFor) -> None:
    async def answer_once(talk: Any) -> None:
        await talk.hear()
        await talk.say(OK)
        if talk.number == 1:
            await talk.hear()  # takes the second request and closes without a word

    async with upstream_for(answer_once) as upstream, open_transport(upstream.base_url) as transport:
        assert await ask(transport) == b"hi"
        assert await ask(transport) == b"hi"
        assert (len(upstream.requests), upstream.connections) == (3, 2)


async def test_a_new_connection_that_closes_before_any_byte_is_a_failure(upstream_for: UpstreamFor) -> None:
    async def never_answer(talk: Any) -> None:
        await talk.hear()

    async with upstream_for(never_answer) as upstream, open_transport(upstream.base_url) as transport:
        with pytest.raises(ConnectionCut):
            await ask(transport)
        assert len(upstream.requests) == 1


async def test_a_reused_connection_that_breaks_after_a_byte_is_a_failure(upstream_for: UpstreamFor) -> None:
    async def answer_once(talk: Any) -> None:
        await talk.hear()
        await talk.say(OK)
        await talk.hear()
        await talk.say(b"H")

    async with upstream_for(answer_once) as upstream, open_transport(upstream.base_url) as transport:
        assert await ask(transport) == b"hi"
        with pytest.raises(ConnectionCut):
            await ask(transport)
        assert len(upstream.requests) == 2


@pytest.mark.parametrize("answer", [OK + b"junk", OK + OK, OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")])
async def test_a_poisoned_connection_is_never_used_again(upstream_for: UpstreamFor, answer: bytes) -> None:
    async def poison(talk: Any) -> None:
        while True:
            await talk.hear()
            await talk.say(answer)

    async with upstream_for(poison) as upstream, open_transport(upstream.base_url) as transport:
        for _ in range(3):
            assert await ask(transport) == b"hi"
        assert (upstream.connections, len(upstream.requests)) == (3, 3)


async def test_an_answer_nobody_asked_for_ends_a_kept_connection(upstream_for: UpstreamFor) -> None:
    async def speak_out_of_turn(talk: Any) -> None:
        await talk.hear()
        await talk.say(OK)
        await asyncio.sleep(0.01)
        await talk.say(OK)
        await talk.wait_for_end()

    async with upstream_for(speak_out_of_turn) as upstream, open_transport(upstream.base_url) as transport:
        await ask(transport)
        await until(lambda: transport.open_connections == 0)
        assert await ask(transport) == b"hi"
        assert upstream.connections == 2


async def test_bytes_that_wait_in_the_socket_at_check_out_are_not_taken_for_the_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        async with open_transport(f"http://127.0.0.1:{server.getsockname()[1]}") as transport:
            asking = asyncio.gather(ask(transport))
            await asyncio.sleep(0.05)
            first, _ = server.accept()
            first.sendall(OK)
            assert await asking == [b"hi"]
            first.sendall(OK.replace(b"hi", b"no"))  # the loop has had no chance to read it when the next call begins
            asking = asyncio.gather(ask(transport))
            await asyncio.sleep(0.05)
            second, _ = server.accept()
            second.sendall(OK)
            assert await asking == [b"hi"]
            first.close()
            second.close()


async def test_an_answer_before_the_request_was_sent_is_the_last_of_its_connection(upstream_for: UpstreamFor) -> None:
    async def refuse_early(talk: Any) -> None:
        await talk.reader.readuntil(b"\r\n\r\n")
        await talk.say(OK.replace(b"200 OK", b"413 No"))
        await asyncio.sleep(0.3)

    async with upstream_for(refuse_early) as upstream, open_transport(upstream.base_url) as transport:
        answer = await transport.send(post(transport), b"x" * (32 << 20))
        assert (answer.status, await answer.read(100)) == (413, b"hi")
        assert transport.idle_connections == 0


async def test_a_slow_reader_slows_the_upstream_and_memory_stays_bounded(upstream_for: UpstreamFor) -> None:
    piece, count = b"x" * 65_536, 400
    said = 0

    async def flood(talk: Any) -> None:
        nonlocal said
        await talk.hear()
        await talk.say(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(piece) * count))
        for _ in range(count):
            await talk.say(piece)
            said += len(piece)
        await talk.wait_for_end()

    async with upstream_for(flood) as upstream, open_transport(upstream.base_url) as transport:
        answer = await transport.send(post(transport), b"{}")
        before = -1
        while before != said:  # until the upstream cannot go on
            before = said
            await asyncio.sleep(0.05)
        assert said < len(piece) * count
        assert answer.reader.size <= HIGH_WATER_BYTES + (1 << 20)
        received = 0
        async for data in answer:
            received += len(data)
            assert answer.reader.size <= HIGH_WATER_BYTES + (1 << 20)
        assert received == len(piece) * count
        assert transport.idle_connections == 1


@pytest.mark.parametrize("words", [b"", CHUNKED, CHUNKED + b"2\r\nhi\r\n"], ids=["no byte", "head", "chunk"])
async def test_cancelling_a_call_closes_the_connection_at_once(upstream_for: UpstreamFor, words: bytes) -> None:
    has_said, has_ended = asyncio.Event(), asyncio.Event()

    async def hang(talk: Any) -> None:
        await talk.hear()
        await talk.say(words)
        has_said.set()
        await talk.wait_for_end()
        has_ended.set()

    async def call(transport: Transport) -> None:
        async for _ in await transport.send(post(transport), b"{}"):
            pass

    async with upstream_for(hang) as upstream, open_transport(upstream.base_url) as transport:
        calling = spawn(call(transport), name="call")
        await has_said.wait()
        await asyncio.sleep(0.02)
        calling.cancel()
        async with asyncio.timeout(0.1):
            await has_ended.wait()
        with pytest.raises(asyncio.CancelledError):
            await calling
        assert transport.open_connections == 0


async def test_aborting_an_answer_closes_the_connection_at_once(upstream_for: UpstreamFor) -> None:
    has_ended = asyncio.Event()

    async def hang(talk: Any) -> None:
        await talk.hear()
        await talk.say(CHUNKED)
        await talk.wait_for_end()
        has_ended.set()

    async with upstream_for(hang) as upstream, open_transport(upstream.base_url) as transport:
        answer = await transport.send(post(transport), b"{}")
        answer.abort()
        async with asyncio.timeout(0.1):
            await has_ended.wait()
        with pytest.raises(ConnectionCut):
            await answer.read(100)


@pytest.mark.parametrize(
    ("words", "deadlines"),
    [
        (b"", replace(LONG, first_byte=0.1)),
        (b"HTTP/1.1 200 OK\r\n", replace(LONG, first_byte=0.1)),
        (b"HTTP/1.1 100 Continue\r\n\r\n", replace(LONG, first_byte=0.1)),
        (CHUNKED, replace(LONG, idle=0.1)),
        (CHUNKED, replace(LONG, total=0.1)),
    ],
    ids=["no byte", "half a head", "only an interim answer", "idle", "total"],
)
async def test_an_upstream_that_falls_silent_is_given_up(
    upstream_for: UpstreamFor, words: bytes, deadlines: Deadlines
) -> None:
    async def fall_silent(talk: Any) -> None:
        await talk.hear()
        await talk.say(words)
        await talk.wait_for_end()

    async with (
        upstream_for(fall_silent) as upstream,
        open_transport(upstream.base_url, deadlines=deadlines) as transport,
    ):
        with pytest.raises(ProviderTimeout):
            await ask(transport)
        assert transport.idle_connections == 0


async def test_any_byte_is_a_sign_of_life(upstream_for: UpstreamFor) -> None:
    async def trickle(talk: Any) -> None:
        await talk.hear()
        await talk.say(CHUNKED + b"14\r\n")
        for _ in range(20):
            await asyncio.sleep(0.05)
            await talk.say(b"x")
        await talk.say(b"\r\n0\r\n\r\n")
        await talk.wait_for_end()

    deadlines = replace(LONG, idle=0.4, first_byte=0.4)
    async with upstream_for(trickle) as upstream, open_transport(upstream.base_url, deadlines=deadlines) as transport:
        assert await ask(transport) == b"x" * 20


async def test_a_slow_reader_does_not_make_the_upstream_idle(upstream_for: UpstreamFor) -> None:
    async def flood(talk: Any) -> None:
        await talk.hear()
        await talk.say(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (16 << 20))
        await talk.say(b"x" * (16 << 20))
        await talk.wait_for_end()

    deadlines = replace(LONG, idle=0.2)
    async with upstream_for(flood) as upstream, open_transport(upstream.base_url, deadlines=deadlines) as transport:
        answer = await transport.send(post(transport), b"{}")
        await asyncio.sleep(0.6)
        assert sum([len(data) async for data in answer]) == 16 << 20


async def test_a_connection_is_not_kept_for_ever(upstream_for: UpstreamFor) -> None:
    deadlines = replace(LONG, keep=0.05)
    async with (
        upstream_for(answer_all) as upstream,
        open_transport(upstream.base_url, deadlines=deadlines) as transport,
    ):
        await ask(transport)
        await until(lambda: transport.open_connections == 0)
        assert transport.idle_connections == 0


async def test_an_answer_that_is_too_large_is_refused_before_it_is_read(upstream_for: UpstreamFor) -> None:
    async def boast(talk: Any) -> None:
        await talk.hear()
        await talk.say(b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999\r\n\r\n")
        await talk.wait_for_end()

    async with upstream_for(boast) as upstream, open_transport(upstream.base_url) as transport:
        with pytest.raises(ProviderUnavailable):
            await ask(transport)


async def test_an_answer_that_grows_too_large_is_cut(upstream_for: UpstreamFor) -> None:
    async def go_on(talk: Any) -> None:
        await talk.hear()
        await talk.say(CHUNKED)
        while True:
            await talk.say(b"400\r\n" + b"x" * 1024 + b"\r\n")

    async with upstream_for(go_on) as upstream, open_transport(upstream.base_url) as transport:
        with pytest.raises(AnswerInvalid):
            await ask(transport)


async def test_all_that_came_before_a_cut_is_handed_out_first(upstream_for: UpstreamFor) -> None:
    async def cut(talk: Any) -> None:
        await talk.hear()
        await talk.say(CHUNKED + b"2\r\nhi\r\n5\r\nhel")

    received = b""
    async with upstream_for(cut) as upstream, open_transport(upstream.base_url) as transport:
        answer = await transport.send(post(transport), b"{}")
        with pytest.raises(ConnectionCut):  # noqa: PT012
            async for data in answer:
                received += data
        assert received == b"hihel"


async def test_a_reset_is_no_end_of_a_body(upstream_for: UpstreamFor) -> None:
    async def reset(talk: Any) -> None:
        await talk.hear()
        await talk.say(b"HTTP/1.1 200 OK\r\n\r\nhi")
        await asyncio.sleep(0.02)
        talk.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        talk.writer.transport.abort()

    async with upstream_for(reset) as upstream, open_transport(upstream.base_url) as transport:
        with pytest.raises(ConnectionCut):
            await ask(transport)


async def test_a_released_answer_gives_its_connection_back_when_its_end_comes(upstream_for: UpstreamFor) -> None:
    async def end_late(talk: Any) -> None:
        while True:
            await talk.hear()
            await talk.say(CHUNKED + b"2\r\nhi\r\n")
            await asyncio.sleep(0.02)
            await talk.say(b"0\r\n\r\n")

    async with upstream_for(end_late) as upstream, open_transport(upstream.base_url) as transport:
        for _ in range(2):
            answer = await transport.send(post(transport), b"{}")
            assert await anext(answer) == b"hi"
            answer.release(10)
            await until(lambda: transport.idle_connections == 1)
        assert upstream.connections == 1


async def test_a_released_answer_that_goes_on_is_cut(upstream_for: UpstreamFor) -> None:
    async def stall(talk: Any) -> None:
        await talk.hear()
        await talk.say(CHUNKED)
        await talk.wait_for_end()

    async with upstream_for(stall) as upstream, open_transport(upstream.base_url) as transport:
        answer = await transport.send(post(transport), b"{}")
        answer.release(0.02)
        await until(lambda: transport.open_connections == 0)


async def test_nobody_listening_is_a_failure_to_connect() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    async with open_transport(f"http://127.0.0.1:{port}") as transport:
        with pytest.raises(ConnectFailed, match="refused"):
            await ask(transport)


async def test_a_name_that_is_none_is_a_failure_to_connect() -> None:
    async with open_transport("http://no-such-host.invalid") as transport:
        with pytest.raises(ConnectFailed):
            await ask(transport)


async def test_a_handshake_that_never_ends_is_given_up(upstream_for: UpstreamFor, certificates: Any) -> None:
    async def never_answer(talk: Any) -> None:
        await talk.wait_for_end()

    async with upstream_for(never_answer) as upstream:
        url = upstream.base_url.replace("http:", "https:")
        deadlines = replace(LONG, connect=0.1)
        async with open_transport(url, deadlines=deadlines, ssl_context=certificates.trusting()) as transport:
            with pytest.raises(ConnectTimedOut):
                await ask(transport)


async def test_tls_connections_are_verified_and_kept(upstream_for: UpstreamFor, certificates: Any) -> None:
    context = certificates.serving("127.0.0.1")
    async with (
        upstream_for(answer_all, ssl_context=context) as upstream,
        open_transport(upstream.base_url, ssl_context=certificates.trusting()) as transport,
    ):
        for _ in range(3):
            assert await ask(transport, b"x" * 300_000) == b"hi"
        assert upstream.connections == 1


async def test_a_certificate_for_another_name_is_refused(upstream_for: UpstreamFor, certificates: Any) -> None:
    context = certificates.serving("example.org")
    async with (
        upstream_for(answer_all, ssl_context=context) as upstream,
        open_transport(upstream.base_url, ssl_context=certificates.trusting()) as transport,
    ):
        with pytest.raises(ConnectFailed, match="certificate"):
            await ask(transport)
        assert upstream.requests == []


async def test_an_unknown_authority_is_refused_by_default(upstream_for: UpstreamFor, certificates: Any) -> None:
    context = certificates.serving("127.0.0.1")
    async with (
        upstream_for(answer_all, ssl_context=context) as upstream,
        open_transport(upstream.base_url) as transport,
    ):
        with pytest.raises(ConnectFailed, match="certificate"):
            await ask(transport)


async def test_an_encrypted_body_that_only_the_close_ends_is_whole_at_the_close(
    upstream_for: UpstreamFor, certificates: Any
) -> None:
    async def close(talk: Any) -> None:
        await talk.hear()
        await talk.say(b"HTTP/1.1 200 OK\r\n\r\nhello")

    context = certificates.serving("127.0.0.1")
    async with (
        upstream_for(close, ssl_context=context) as upstream,
        open_transport(upstream.base_url, ssl_context=certificates.trusting()) as transport,
    ):
        assert await ask(transport) == b"hello"


async def test_closing_the_transport_ends_calls_under_way(upstream_for: UpstreamFor) -> None:
    async def hang(talk: Any) -> None:
        await talk.hear()
        await talk.wait_for_end()

    async with upstream_for(hang) as upstream, open_transport(upstream.base_url) as transport:
        asking = asyncio.gather(ask(transport), return_exceptions=True)
        await until(lambda: len(upstream.requests) == 1)
        await transport.close()
        assert isinstance((await asking)[0], ConnectionCut)
        with pytest.raises(ConnectFailed):
            await ask(transport)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.org",
        "ftp://example.org",
        "http://",
        "http://user:secret@example.org",
        "http://h/v1?x=1",
        "http://h#f",
    ],
)
async def test_a_base_url_is_scheme_host_port_and_path(url: str) -> None:
    with pytest.raises(ValueError, match="base URL"):
        Transport(url)


@pytest.mark.parametrize(("name", "value"), [(b"a", b"b\r\nc: d"), (b"a\n", b"b"), (b"a", b"b\0"), (b"a", b"\xe9")])
async def test_a_header_field_cannot_hold_another(name: bytes, value: bytes) -> None:
    async with open_transport("http://127.0.0.1:1") as transport:
        with pytest.raises(ValueError, match="header field"):
            await transport.send(post(transport), b"{}", [(name, value)])
