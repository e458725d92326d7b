"""A provider that answers at once with canned bytes: an upstream cheap enough to stay out of what is measured.

    python -m ibexctl.bench.responder [--delay-ms N] [--events N] [--gap-ms N] [--certificate FILE]

It prints its port as a line. A request whose body asks for a stream gets `--events` events, `--gap-ms` apart, the first
at once; any other gets a completion after `--delay-ms`. A request can ask for another pace in its metadata: with
`"pace": "40x16384@500"` it gets 40 events with texts of 16,384 bytes, 500 ms apart.
"""

import argparse
import asyncio
import os
import re
import signal
import ssl
import sys
from dataclasses import dataclass, field
from typing import Final, cast

import httptools
import msgspec
import setproctitle
import uvloop

from ibex.server.process import die_with

_WANTS_STREAM: Final = re.compile(rb'"stream"\s*:\s*true').search
_PACE: Final = re.compile(rb'"pace"\s*:\s*"(\d+)x(\d+)@(\d+)"').search
_ID: Final = "chatcmpl-000000000000000000000000"
_USAGE: Final = {"prompt_tokens": 12, "completion_tokens": 64, "total_tokens": 76}


def completion() -> bytes:
    """The whole answer to a request that does not stream: head and body."""
    message = {"role": "assistant", "content": "IBEX_OK", "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    body = msgspec.json.encode(
        {**_frame("chat.completion"), "choices": [choice], "usage": _USAGE | {"prompt_tokens_details": None}}
    )
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def stream(events: int, text: str = "token ") -> list[bytes]:
    """The writes of a streamed answer: the head with the first event, then an event each, the end with the last."""
    deltas = [{"role": "assistant", "content": ""}, *({"content": text} for _ in range(events - 3)), {}]
    items = [_item(delta, "stop" if not delta else None) for delta in deltas[-(events - 1) :]]
    items.append(msgspec.json.encode({**_frame("chat.completion.chunk"), "choices": [], "usage": _USAGE}))
    writes = [_chunk(b"data: " + item + b"\n\n") for item in items]
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
    writes[0] = head + writes[0]
    writes[-1] += _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
    return writes


def _frame(kind: str) -> dict[str, object]:
    return {"id": _ID, "object": kind, "created": 1_700_000_000, "model": "gpt-4o-mini"}


def _item(delta: dict[str, str], reason: str | None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
    return msgspec.json.encode({**_frame("chat.completion.chunk"), "choices": [choice], "usage": None})


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@dataclass(frozen=True, slots=True)
class Stream:
    """The writes of a streamed answer, and the seconds between two of them."""

    writes: list[bytes]
    gap: float


@dataclass(frozen=True, slots=True)
class Answers:
    """What is answered."""

    json: bytes
    delay: float
    """Seconds before an answer that does not stream."""
    stream: Stream
    paced: dict[bytes, Stream] = field(default_factory=dict)
    """Other streams that were asked for, by how they were."""

    def stream_for(self, body: bytes) -> Stream:
        """The stream at the pace that the request asks for."""
        asked = _PACE(body)
        if asked is None:
            return self.stream
        found = self.paced.get(asked[0])
        if found is None:
            events, size, gap_ms = map(int, asked.groups())
            found = self.paced[asked[0]] = Stream(stream(max(4, events), "x" * size), gap_ms / 1000)
        return found


class Peer(asyncio.Protocol):
    """One connection, one request at a time."""

    __slots__ = ("_answers", "_body", "_loop", "_parser", "_timer", "_transport")

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self._parser = httptools.HttpRequestParser(self)
        self._body = b""
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 (asyncio's signature)
        if self._timer is not None:
            self._timer.cancel()

    def on_body(self, data: bytes) -> None:
        self._body = self._body + data if self._body else data

    def on_message_complete(self) -> None:
        body, self._body = self._body, b""
        answers = self._answers
        if _WANTS_STREAM(body):
            self._write_event(answers.stream_for(body), 0, self._loop.time())
        elif answers.delay:
            self._timer = self._loop.call_later(answers.delay, self._transport.write, answers.json)
        else:
            self._transport.write(answers.json)

    def _write_event(self, stream: Stream, number: int, due: float) -> None:
        """Each event is due a gap after the one before was, not after it was written: a late one shifts no other."""
        self._transport.write(stream.writes[number])
        if number + 1 < len(stream.writes):
            due += stream.gap
            self._timer = self._loop.call_at(due, self._write_event, stream, number + 1, due)


async def serve(arguments: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    paced = Stream(stream(arguments.events), arguments.gap_ms / 1000)
    answers = Answers(completion(), arguments.delay_ms / 1000, paced)
    context = None
    if arguments.certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(arguments.certificate)
    server = await loop.create_server(lambda: Peer(answers), "127.0.0.1", 0, backlog=4096, ssl=context)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await stop.wait()
    server.close()


def main() -> None:
    """The process's entry."""
    parser = argparse.ArgumentParser(prog="python -m ibexctl.bench.responder")
    parser.add_argument("--delay-ms", type=float, default=0.0)
    parser.add_argument("--events", type=int, default=64)
    parser.add_argument("--gap-ms", type=float, default=5.0)
    parser.add_argument("--certificate", help="a file with a key and its certificate: speak TLS")
    setproctitle.setproctitle("ibex: bench provider")
    die_with(os.getppid())
    uvloop.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
