"""The language between the supervisor and a child: length-prefixed MessagePack frames over a socket pair."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from typing import Any, Self, cast

import msgspec

MAX_FRAME_BYTES = 16 << 20
MAX_WAITING_BYTES = 8 << 20
"""What may wait for a far side that does not read, before messages that can be spared are dropped."""

CLOSE_SECONDS = 1.0

_LENGTH = struct.Struct(">I")


class Message(msgspec.Struct, array_like=True, tag=True):
    """One frame."""


class Ready(Message):
    """Child: it serves."""

    facts: dict[str, Any] = {}


class Failed(Message):
    """Child: it cannot start, and this is what the operator should read."""

    message: str
    hint: str | None = None


class Report(Message):
    """Child, each second and at its end: its metrics, and facts about itself for `ibexctl status`."""

    snapshot: bytes
    facts: dict[str, Any] = {}


class Share(Message):
    """Worker to all other workers, and to those that start later: opaque bytes; a later one replaces its key's."""

    key: bytes
    payload: bytes


class MetricsQuestion(Message):
    """Worker: what are the metrics of the whole node?"""

    number: int


class StatusQuestion(Message):
    """Child: how is the node?"""

    number: int


class MetricsAnswer(Message):
    """Supervisor: the node's metrics as Prometheus text."""

    number: int
    text: bytes


class StatusAnswer(Message):
    """Supervisor: the node's status."""

    number: int
    status: dict[str, Any]


class Adopt(Message):
    """Supervisor to a worker: accept on this slot's listening socket too."""

    slot: int


class Release(Message):
    """Supervisor to a worker: leave this slot's listening socket to its own worker again."""

    slot: int


class Drain(Message):
    """Supervisor to a child: take nothing new, finish within this time (s), then exit."""

    seconds: float
    has_successor: bool = False
    """Whether another process serves in its place already."""


class Withdraw(Message):
    """Supervisor to a worker: go on as you are, and say at /ready that this node is about to leave."""


class Unfinished(Message, order=True):
    """Worker, at the end of its time to drain: what it has not answered to the end, and cuts."""

    requests: int
    """Those that are no streams."""
    streams: int


AnyMessage = (
    Ready
    | Failed
    | Report
    | Share
    | MetricsQuestion
    | StatusQuestion
    | MetricsAnswer
    | StatusAnswer
    | Adopt
    | Release
    | Drain
    | Withdraw
    | Unfinished
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


class Channel(asyncio.Protocol):
    """One end of the socket pair; callbacks run on the event loop, in the order of the messages."""

    def __init__(self, on_message: Callable[[AnyMessage], None], on_lost: Callable[[], None]) -> None:
        self._on_message = on_message
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._lost = asyncio.Event()

    @classmethod
    async def open(
        cls, sock: socket.socket, on_message: Callable[[AnyMessage], None], on_lost: Callable[[], None]
    ) -> Self:
        """Take over this end; it owns the socket from now on."""
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        _, channel = await loop.create_connection(lambda: cls(on_message, on_lost), sock=sock)
        return channel

    def send(self, message: AnyMessage) -> None:
        """Send it, without waiting; a lost channel swallows it."""
        if self._transport is not None and not self._transport.is_closing():
            frame = _encoder.encode(message)
            self._transport.write(_LENGTH.pack(len(frame)) + frame)

    def offer(self, message: AnyMessage) -> bool:
        """Send what can be spared: dropped (False) while too much waits for the far side."""
        if self._transport is None or self._transport.get_write_buffer_size() > MAX_WAITING_BYTES:
            return False
        self.send(message)
        return True

    async def close(self) -> None:
        """Close this end, once what was sent has left or a second has passed."""
        if self._transport is None:
            return
        self._transport.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._lost.wait()
        self._abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The event loop's callback."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """The event loop's callback: every whole frame becomes a message."""
        self._received += data
        start = 0
        while len(self._received) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._received, start)
            end = start + _LENGTH.size + length
            if length > MAX_FRAME_BYTES:
                self._abort()
                return
            if len(self._received) < end:
                break
            self._on_message(_decoder.decode(self._received[start + _LENGTH.size : end]))
            start = end
        del self._received[:start]

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 (asyncio's signature)
        """The event loop's callback: the far side has closed or died."""
        self._transport = None
        self._lost.set()
        self._on_lost()

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()
