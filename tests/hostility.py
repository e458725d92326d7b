"""A hostile provider: every way an answer can be broken, and what a client must see of each."""

import base64
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from typing import Any

JSON_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
COMPLETION = b'{"choices":[{"index":0,"message":{"content":"hi"},"finish_reason":"stop"}]}'
EVENTS = (
    b'data: {"choices":[{"index":0,"delta":{"content":"h"}}]}\n\n',
    b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n',
    b"data: [DONE]\n\n",
)
ENDINGS = ("close", "half_close", "reset", "hang", "keep")
SILENT = frozenset({"hang", "keep"})
"""Endings after which the provider says nothing more, and leaves the connection open."""
TRICKLE = {"piece_bytes": 1, "gap_ms": 1}


class Framing(StrEnum):
    """What tells where a body ends."""

    LENGTH = "length"
    CHUNKED = "chunked"
    CLOSE = "close"


@dataclass(frozen=True)
class Script:
    """A proper answer as bytes, and which of them are its body."""

    framing: Framing
    is_streaming: bool
    head_size: int
    parts: tuple[tuple[bytes, bool], ...]

    @property
    def raw(self) -> bytes:
        """All of it."""
        return b"".join(data for data, _ in self.parts)

    def body_within(self, size: int) -> bytes:
        """The body's bytes among the first `size`."""
        body, start = b"", 0
        for data, is_body in self.parts:
            body += data[: max(0, size - start)] if is_body else b""
            start += len(data)
        return body


@cache
def script(framing: Framing, *, is_streaming: bool) -> Script:
    """The answer in this framing."""
    bodies = EVENTS if is_streaming else (COMPLETION[:20], COMPLETION[20:])
    head = STREAM_HEAD if is_streaming else JSON_HEAD
    if framing is Framing.CHUNKED:
        head += b"Transfer-Encoding: chunked\r\n\r\n"
        chunks = [((b"%x\r\n" % len(body), False), (body, True), (b"\r\n", False)) for body in bodies]
        parts = ((head, False), *(part for chunk in chunks for part in chunk), (b"0\r\n\r\n", False))
    else:
        if framing is Framing.LENGTH:
            head += b"Content-Length: %d\r\n" % sum(map(len, bodies))
        head += b"\r\n"
        parts = ((head, False), *((body, True) for body in bodies))
    return Script(framing, is_streaming, len(head), parts)


@dataclass(frozen=True)
class Expected:
    """What the client must see. `body` is what comes of the reply itself, without an error item after it."""

    status: int
    code: str | None = None
    body: bytes | None = None
    is_whole: bool = True


@dataclass(frozen=True)
class Attack:
    """One request's trouble. Without an expectation the provider is odd beyond prediction: then invariants alone."""

    name: str
    raw: bytes
    ending: str = "close"
    is_streaming: bool = False
    pace: dict[str, float] = field(default_factory=dict)
    expected: Expected | None = None

    @property
    def controls(self) -> dict[str, Any]:
        """What the sandbox is told."""
        return {"raw": base64.b64encode(self.raw).decode(), "raw_end": self.ending, **self.pace}


def cut(proper: Script, size: int, ending: str) -> Attack:
    """A proper answer of which only so many bytes come before this ending."""
    name = f"{proper.framing} {'stream' if proper.is_streaming else 'json'}, {ending} after {size}"
    expected = None if ending == "reset" else _expect(proper, size, ending)
    return Attack(name, proper.raw[:size], ending, proper.is_streaming, {}, expected)


def _expect(proper: Script, size: int, ending: str) -> Expected:
    status, code = (504, "PROVIDER_TIMEOUT") if ending in SILENT else (503, "PROVIDER_UNAVAILABLE")
    if size < proper.head_size:
        return Expected(status, code, is_whole=False)
    body = proper.body_within(size)
    has_ended = size == len(proper.raw) if proper.framing is not Framing.CLOSE else ending not in SILENT
    if not proper.is_streaming:
        return Expected(200, body=body) if has_ended else Expected(status, code, is_whole=False)
    events = [event for number, event in enumerate(EVENTS) if len(body) >= len(b"".join(EVENTS[: number + 1]))]
    if EVENTS[2] in events or (EVENTS[1] in events and has_ended):
        return Expected(200, body=b"".join(events))
    return Expected(200, code, b"".join(events), is_whole=False)


def every_cut(*endings: str, framings: tuple[Framing, ...] = tuple(Framing)) -> list[Attack]:
    """Each byte offset of a JSON reply and of a stream, in each framing, with each of these endings."""
    scripts = [script(framing, is_streaming=kind) for framing in framings for kind in (False, True)]
    return [cut(found, size, ending) for ending in endings for found in scripts for size in range(len(found.raw) + 1)]


def oddities() -> list[Attack]:
    """Trickles, drips that never end, wrong lengths."""
    refused = Expected(503, "PROVIDER_UNAVAILABLE", is_whole=False)
    late = Expected(504, "PROVIDER_TIMEOUT", is_whole=False)
    late_stream = Expected(200, "PROVIDER_TIMEOUT", is_whole=False)
    sizes = (len(COMPLETION) + by for by in (9, -9, 10**5, 10**11))
    long, short, endless, boundless = (JSON_HEAD + b"Content-Length: %d\r\n\r\n" % size + COMPLETION for size in sizes)
    found = [
        Attack("longer than said", short, "keep", expected=Expected(200, body=COMPLETION[:-9])),
        Attack("shorter than said", long, "close", expected=refused),
        Attack("shorter than said, silent", long, "hang", expected=late),
        Attack("said to be boundless", boundless, "hang", expected=refused),
        Attack("a head in drips", long, "hang", pace={"piece_bytes": 1, "gap_ms": 100}, expected=late),
        Attack("a body in drips", endless + b" " * 9999, "hang", pace=_drips(endless), expected=late),
    ]
    comments = STREAM_HEAD + b"\r\n" + b": alive\n\n" * 999
    found.append(Attack("comments in drips", comments, "hang", True, _drips(STREAM_HEAD), late_stream))
    for framing in Framing:
        json, stream = (script(framing, is_streaming=kind).raw for kind in (False, True))
        whole = Expected(200, body=b"".join(EVENTS))
        found.append(Attack(f"trickling, {framing}", json, pace=TRICKLE, expected=Expected(200, body=COMPLETION)))
        found.append(Attack(f"a trickling stream, {framing}", stream, "close", True, TRICKLE, whole))
    return found


def _drips(head: bytes) -> dict[str, float]:
    """The head at once, then so much again and again: never idle, and never at an end within any sensible time."""
    return {"piece_bytes": len(head), "gap_ms": 400}


def wild(seed: int) -> Iterator[Attack]:
    """Garbage and mutated answers without end, with every ending."""
    dice = random.Random(seed)
    scripts = [script(framing, is_streaming=kind) for framing in Framing for kind in (False, True)]
    while True:
        ending = dice.choice(ENDINGS)
        yield Attack("garbage", dice.randbytes(dice.randrange(400)), ending, bool(dice.getrandbits(1)))
        proper = dice.choice(scripts)
        raw = bytearray(proper.raw)
        for _ in range(dice.randrange(1, 4)):
            raw[dice.randrange(len(raw))] = dice.randrange(256)
        yield Attack("a mutated answer", bytes(raw), ending, proper.is_streaming)
        surplus = dice.choice((b"\r\n", b"x", proper.raw))
        yield Attack("more after the end", proper.raw + surplus, "keep", proper.is_streaming)
