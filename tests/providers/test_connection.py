"""One connection and its answers: ends, deadlines, slow readers, cancellation."""

import asyncio
import socket
from dataclasses import replace

import pytest

from ibex.errors import ProviderTimeout, ProviderUnavailable
from ibex.providers.answer import HIGH_WATER_BYTES, ConnectionCut
from ibex.providers.answer_reader import AnswerInvalid
from ibex.providers.connection import Deadlines
from ibex.providers.transport import Transport
from ibex.telemetry import spawn
from tests.providers.upstream import CHUNKED, LONG, OK, Talk, answer_all, ask, open_transport, post, serve_script, until


async def test_an_answer_may_come_byte_by_byte() -> None:
    answer = CHUNKED + b"5\r\nhello\r\n0\r\n\r\n"

    async def trickle(talk: Talk) -> None:
        while True:
            await talk.hear()
            for position in range(len(answer)):
                await talk.say(answer[position : position + 1])
                await asyncio.sleep(0)

    async with serve_script(trickle) as upstream, open_transport(upstream.base_url) as transport:
        assert await ask(transport) == b"hello"
        assert await ask(transport) == b"hello"
        assert upstream.connections == 1


async def test_a_stale_connection_is_replaced_once_and_in_silence() -> None:
    async def answer_once(talk: Talk) -> None:
        await talk.hear()
        await talk.say(OK)
        if talk.number == 1:
            await talk.hear()  # takes the second request and closes without a word

    async with serve_script(answer_once) as upstream, open_transport(upstream.base_url) as transport:
        assert await ask(transport) == b"hi"
        assert await ask(transport) == b"hi"
        assert (len(upstream.requests), upstream.connections) == (3, 2)


async def test_a_new_connection_that_closes_before_any_byte_is_a_failure() -> None:
    async def never_answer(talk: Talk) -> None:
        await talk.hear()

    async with serve_script(never_answer) as upstream, open_transport(upstream.base_url) as transport:
        with pytest.raises(ConnectionCut):
            await ask(transport)
        assert len(upstream.requests) == 1


async def test_a_reused_connection_that_breaks_after_a_byte_is_a_failure() -> None:
    async def answer_once(talk: Talk) -> None:
        await talk.hear()
        await talk.say(OK)
        await talk.hear()
        await talk.say(b"H")

    async with serve_script(answer_once) as upstream, open_transport(upstream.base_url) as transport:
        assert await ask(transport) == b"hi"
        with pytest.raises(ConnectionCut):
            await ask(transport)
        assert len(upstream.requests) == 2


@pytest.mark.parametrize("answer", [OK + b"junk", OK + OK, OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")])
async def test_a_poisoned_connection_is_never_used_again(answer: bytes) -> None:
    async def poison(talk: Talk) -> None:
        while True:
            await talk.hear()
            await talk.say(answer)

    async with serve_script(poison) as upstream, open_transport(upstream.base_url) as transport:
        for _ in range(3):
            assert await ask(transport) == b"hi"
        assert (upstream.connections, len(upstream.requests)) == (3, 3)


async def test_an_answer_nobody_asked_for_ends_a_kept_connection() -> None:
    async def speak_out_of_turn(talk: Talk) -> None:
        await talk.hear()
        await talk.say(OK)
        await asyncio.sleep(0.01)
        await talk.say(OK)
        await talk.wait_for_end()

    async with serve_script(speak_out_of_turn) as upstream, open_transport(upstream.base_url) as transport:
        await ask(transport)
        await until(lambda: transport.open_connections == 0)
        assert await ask(transport) == b"hi"
        assert upstream.connections == 2


async def test_bytes_that_wait_in_the_socket_at_check_out_are_not_taken_for_the_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(20)
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


async def test_an_answer_before_the_request_was_sent_is_the_last_of_its_connection() -> None:
    async def refuse_early(talk: Talk) -> None:
        await talk.reader.readuntil(b"\r\n\r\n")
        await talk.say(OK.replace(b"200 OK", b"413 No"))
        await asyncio.sleep(0.3)

    async with serve_script(refuse_early) as upstream, open_transport(upstream.base_url) as transport:
        answer = await transport.send(post(transport), b"x" * (32 << 20))
        assert (answer.status, await answer.read(100)) == (413, b"hi")
        assert transport.idle_connections == 0


async def test_a_slow_reader_slows_the_upstream_and_memory_stays_bounded() -> None:
    piece, count = b"x" * 65_536, 400
    said = 0

    async def flood(talk: Talk) -> None:
        nonlocal said
        await talk.hear()
        await talk.say(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(piece) * count))
        for _ in range(count):
            await talk.say(piece)
            said += len(piece)
        await talk.wait_for_end()

    async with serve_script(flood) as upstream, open_transport(upstream.base_url) as transport:
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
async def test_cancelling_a_call_closes_the_connection_at_once(words: bytes) -> None:
    has_said, has_ended = asyncio.Event(), asyncio.Event()

    async def hang(talk: Talk) -> None:
        await talk.hear()
        await talk.say(words)
        has_said.set()
        await talk.wait_for_end()
        has_ended.set()

    async def call(transport: Transport) -> None:
        async for _ in await transport.send(post(transport), b"{}"):
            pass

    async with serve_script(hang) as upstream, open_transport(upstream.base_url) as transport:
        calling = spawn(call(transport), name="call")
        await has_said.wait()
        await asyncio.sleep(0.02)
        calling.cancel()
        async with asyncio.timeout(2):
            await has_ended.wait()
        with pytest.raises(asyncio.CancelledError):
            await calling
        assert transport.open_connections == 0


async def test_aborting_an_answer_closes_the_connection_at_once() -> None:
    has_ended = asyncio.Event()

    async def hang(talk: Talk) -> None:
        await talk.hear()
        await talk.say(CHUNKED)
        await talk.wait_for_end()
        has_ended.set()

    async with serve_script(hang) as upstream, open_transport(upstream.base_url) as transport:
        answer = await transport.send(post(transport), b"{}")
        answer.abort()
        async with asyncio.timeout(2):
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
async def test_an_upstream_that_falls_silent_is_given_up(words: bytes, deadlines: Deadlines) -> None:
    async def fall_silent(talk: Talk) -> None:
        await talk.hear()
        await talk.say(words)
        await talk.wait_for_end()

    async with (
        serve_script(fall_silent) as upstream,
        open_transport(upstream.base_url, deadlines=deadlines) as transport,
    ):
        with pytest.raises(ProviderTimeout):
            await ask(transport)
        assert transport.idle_connections == 0


async def test_any_byte_is_a_sign_of_life() -> None:
    async def trickle(talk: Talk) -> None:
        await talk.hear()
        await talk.say(CHUNKED + b"14\r\n")
        for _ in range(20):
            await asyncio.sleep(0.05)
            await talk.say(b"x")
        await talk.say(b"\r\n0\r\n\r\n")
        await talk.wait_for_end()

    deadlines = replace(LONG, idle=0.4, first_byte=0.4)
    async with serve_script(trickle) as upstream, open_transport(upstream.base_url, deadlines=deadlines) as transport:
        assert await ask(transport) == b"x" * 20


async def test_a_slow_reader_does_not_make_the_upstream_idle() -> None:
    async def flood(talk: Talk) -> None:
        await talk.hear()
        await talk.say(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (16 << 20))
        await talk.say(b"x" * (16 << 20))
        await talk.wait_for_end()

    deadlines = replace(LONG, idle=0.2)
    async with serve_script(flood) as upstream, open_transport(upstream.base_url, deadlines=deadlines) as transport:
        answer = await transport.send(post(transport), b"{}")
        await asyncio.sleep(0.6)
        assert sum([len(data) async for data in answer]) == 16 << 20


async def test_a_connection_is_not_kept_for_ever() -> None:
    deadlines = replace(LONG, keep=0.05)
    async with (
        serve_script(answer_all) as upstream,
        open_transport(upstream.base_url, deadlines=deadlines) as transport,
    ):
        await ask(transport)
        await until(lambda: transport.open_connections == 0)
        assert transport.idle_connections == 0


async def test_an_answer_that_is_too_large_is_refused_before_it_is_read() -> None:
    async def boast(talk: Talk) -> None:
        await talk.hear()
        await talk.say(b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999\r\n\r\n")
        await talk.wait_for_end()

    async with serve_script(boast) as upstream, open_transport(upstream.base_url) as transport:
        with pytest.raises(ProviderUnavailable):
            await ask(transport)


async def test_an_answer_that_grows_too_large_is_cut() -> None:
    async def go_on(talk: Talk) -> None:
        await talk.hear()
        await talk.say(CHUNKED)
        while True:
            await talk.say(b"400\r\n" + b"x" * 1024 + b"\r\n")

    async with serve_script(go_on) as upstream, open_transport(upstream.base_url) as transport:
        with pytest.raises(AnswerInvalid):
            await ask(transport)


async def test_all_that_came_before_a_cut_is_handed_out_first() -> None:
    async def cut(talk: Talk) -> None:
        await talk.hear()
        await talk.say(CHUNKED + b"2\r\nhi\r\n5\r\nhel")

    received = b""
    async with serve_script(cut) as upstream, open_transport(upstream.base_url) as transport:
        answer = await transport.send(post(transport), b"{}")
        with pytest.raises(ConnectionCut):  # noqa: PT012
            async for data in answer:
                received += data
        assert received == b"hihel"


async def test_a_reset_is_no_end_of_a_body() -> None:
    async def reset(talk: Talk) -> None:
        await talk.hear()
        await talk.say(b"HTTP/1.1 200 OK\r\n\r\nhi")
        await asyncio.sleep(0.02)
        talk.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        talk.writer.transport.abort()

    async with serve_script(reset) as upstream, open_transport(upstream.base_url) as transport:
        with pytest.raises(ConnectionCut):
            await ask(transport)


async def test_a_released_answer_gives_its_connection_back_when_its_end_comes() -> None:
    async def end_late(talk: Talk) -> None:
        while True:
            await talk.hear()
            await talk.say(CHUNKED + b"2\r\nhi\r\n")
            await asyncio.sleep(0.02)
            await talk.say(b"0\r\n\r\n")

    async with serve_script(end_late) as upstream, open_transport(upstream.base_url) as transport:
        for _ in range(2):
            answer = await transport.send(post(transport), b"{}")
            assert await anext(answer) == b"hi"
            answer.release(10)
            await until(lambda: transport.idle_connections == 1)
        assert upstream.connections == 1


async def test_a_released_answer_that_goes_on_is_cut() -> None:
    async def stall(talk: Talk) -> None:
        await talk.hear()
        await talk.say(CHUNKED)
        await talk.wait_for_end()

    async with serve_script(stall) as upstream, open_transport(upstream.base_url) as transport:
        answer = await transport.send(post(transport), b"{}")
        answer.release(0.02)
        await until(lambda: transport.open_connections == 0)
