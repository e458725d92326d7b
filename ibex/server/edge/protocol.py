"""One client connection over aiohttp: what its parser alone does not give to an edge that faces strangers."""

import asyncio
import contextlib
import fcntl
import logging
import struct
import sys
import termios
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import Any, Protocol

from aiohttp.http_exceptions import LineTooLong
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import RequestHandler, _ErrInfo

from ibex.errors import HeadersTooLarge, PayloadTooLarge, RequestError, RequestTimeout, ValidationFailed
from ibex.server.edge.head import RequestHead
from ibex.server.edge.repeats import Payload, RepeatedHead

log = logging.getLogger("ibex.server")


class Ended(Protocol):
    """A reply that is on the wire."""

    keep_alive: bool
    """Whether the connection may take another request."""


Serve = Callable[["EdgeProtocol", RequestHead, Payload], Awaitable[Ended]]

MAX_FIELD_BYTES = 16 << 10
MAX_HEAD_BYTES = 32 << 10
MAX_FIELDS = 128
WIRE_BYTES_BESIDES_BODY = 16 << 10
WIRE_BYTES_PER_BODY_BYTE = 8
"""What chunked framing may cost: a chunk of one byte takes six."""
MAX_QUEUED_BYTES = 256 << 10
"""Of requests pipelined behind the one being served; then the socket is not read until that one is answered."""
MAX_LESSONS = 8
"""How many heads of a connection are learnt: a client whose heads all differ is not worth learning more from."""
LINGER_SECONDS = 2.0
"""How long a client that is still sending may take to read why it is refused."""

_UNREAD = struct.Struct("i")

_OTHER_PROTOCOLS = (b" RTSP/1.0\r\n", b" ICE/1.0\r\n")
"""The parser takes these for HTTP/1.0. No JSON holds them: a line break ends them, and a string has none."""


class EdgeProtocol(RequestHandler):
    """One client connection. `received_at`: when the first byte of the request being read came (monotonic seconds)."""

    __slots__ = (
        "_head",
        "_is_deaf",
        "_lessons_left",
        "_newest",
        "_queued_bytes",
        "_repeated",
        "_serve",
        "_whole",
        "_wire_bytes",
        "address",
        "closing_since",
        "is_serving",
        "received_at",
    )

    def __init__(self, manager: Any, *, serve: Serve, **options: Any) -> None:
        super().__init__(manager, **options)
        self._serve = serve
        self.address = "local"
        self.received_at = 0.0
        self.closing_since = 0.0
        """When it was first seen to wait for a client that does not take the last bytes."""
        self.is_serving = False
        self._is_deaf = False
        """Whether whatever still comes in is dropped."""
        self._newest: tuple[Any, Any] | None = None
        """The request the parser has begun last: the next bytes are its body's or the next head's."""
        self._head = bytearray()
        """The beginning of a head, when it came in pieces."""
        self._wire_bytes = 0
        self._queued_bytes = 0
        self._whole = b""
        """The bytes of the request just begun, when they came all at once."""
        self._repeated: RepeatedHead | None = None
        self._lessons_left = MAX_LESSONS

    async def start(self) -> None:
        """Serve the connection's requests one after the other, in this one task; it ends with the connection.

        aiohttp's own loop makes a task, a request object and a writer for each request: a tenth of what a request costs
        here, for what ibex does not use.
        """
        try:
            while not self._force_close:
                message, payload = await self._next_message()
                head = message if isinstance(message, RequestHead) else self._read_head(message)
                self._request_in_progress = True
                try:
                    reply = await self._serve(self, head, payload)
                finally:
                    self._note_answered()
                if not reply.keep_alive or self._close or not payload.is_eof():
                    break
                self._wait_for_the_next()
        except asyncio.CancelledError:
            self.force_close()
            raise
        except Exception as error:  # noqa: BLE001 - a bug ends this connection, and says so
            self.log_exception(exc_info=error)
            self.force_close()
        if not self._force_close:
            self._task_handler = None
            if self.transport is not None:
                self.transport.close()

    def _read_head(self, message: Any) -> RequestHead:
        if isinstance(message, _ErrInfo):
            return RequestHead.of_no_request(_translate(message))
        head = RequestHead.read(message)
        if self._whole and self._lessons_left:
            self._lessons_left -= 1
            self._repeated = RepeatedHead.learn(self._whole, head)
        self._whole = b""
        return head

    async def _next_message(self) -> tuple[Any, Payload]:
        if not self._messages:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        message = self._messages.popleft()
        if self._parser is not None and not isinstance(message[0], RequestHead):
            self._parser.message_consumed()
        if self._buffer_paused and len(self._messages) <= self._msg_queue_resume_size:
            self._resume_reading_if_drained()
        return message

    def _note_answered(self) -> None:
        self._request_in_progress = False
        if self._handler_waiter is not None and not self._handler_waiter.done():
            self._handler_waiter.set_result(None)

    def _wait_for_the_next(self) -> None:
        close_at = self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        if self._keepalive_handle is None:
            self._keepalive_handle = self._loop.call_at(close_at, self._process_keepalive)

    def data_received(self, data: bytes) -> None:
        """Stamp the first byte of a request before anything else sees it; after the parser, judge what it let pass."""
        if self._is_deaf or self._force_close or self._close:
            return
        is_first = not self.received_at and not self.is_serving
        if is_first and self._repeated is not None and self._take_repeated(self._repeated, data):
            return
        if is_first and data.lstrip(b"\r\n"):
            self.received_at = perf_counter()
        was_in_body = self._newest is not None and not self._newest[1].is_eof()
        super().data_received(data)
        messages = self._messages
        if messages and messages[-1] is not self._newest:
            self._whole = data if is_first and len(messages) == 1 and not self._head else b""
            self._judge_newest(data)
        elif was_in_body:
            self._wire_bytes += len(data)
            self._judge_framing()
        elif data:
            self._head += data
            if len(self._head) > MAX_HEAD_BYTES:
                self.fail(HeadersTooLarge())
        if messages:
            self._queued_bytes += len(data)
            if self._queued_bytes > MAX_QUEUED_BYTES and not self._buffer_paused:
                self._pause_reading_for_buffer()

    def _take_repeated(self, repeated: RepeatedHead, data: bytes) -> bool:
        """Take a request that is the same head again and its whole body; the parser, between two messages, sees none
        of it.
        """
        waiter = self._waiter
        messages: Any = self._messages
        if waiter is None or waiter.done() or messages or self._head:
            return False
        taken = repeated.find(data)
        if taken is None:
            return False
        self.received_at = perf_counter()
        self._newest = taken
        messages.append(taken)
        waiter.set_result(None)
        return True

    def _judge_newest(self, data: bytes) -> None:
        """A request's head is whole, or the parser has given up."""
        before, self._newest = self._newest, self._messages[-1]
        message = self._newest[0]
        if isinstance(message, _ErrInfo):
            self._is_deaf = True
            if before is not None and not before[1].is_eof():
                before[1].set_exception(ValidationFailed("The body is not framed as HTTP/1.1 demands."))
            return
        size = len(self._head) + len(data)
        if size > MAX_HEAD_BYTES or message.version < (1, 1) or len(self._messages) > 1:
            fault = _find_fault_on_the_wire(bytes(self._head) + data)
            if fault is not None:
                self._messages.pop()
                self.fail(fault)
                return
        if self._head:
            self._head = bytearray()
        self._wire_bytes = max(0, size - MAX_HEAD_BYTES)
        if self._wire_bytes:
            self._judge_framing()

    def _judge_framing(self) -> None:
        """Refuse a body that is mostly framing. A length needs none."""
        if self._newest is None or self._reading_paused:  # paused, the parser has not seen all that is counted
            return
        message, payload = self._newest
        if (
            not isinstance(message, _ErrInfo)
            and message.chunked
            and self._wire_bytes > WIRE_BYTES_BESIDES_BODY + WIRE_BYTES_PER_BODY_BYTE * payload.total_bytes
        ):
            self._is_deaf = True
            payload.set_exception(PayloadTooLarge("The body's chunks are out of all proportion to what is in them."))

    def fail(self, error: RequestError) -> None:
        """Answer the bytes being read with an error, after all that was asked before them, and hear no more."""
        self._is_deaf = True
        self._newest = (_ErrInfo(error.http_status, error, ""), EMPTY_PAYLOAD)
        self._messages.append(self._newest)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def begin_request(self) -> float:
        """The stamp of the request now being handled; one that was pipelined begins when its turn comes."""
        self.is_serving = True
        self._queued_bytes = 0
        return self.received_at or perf_counter()

    def interrupt(self) -> None:
        """Cancel the request that is being served; its answer is the last."""
        if self._task_handler is not None:
            self._task_handler.cancel()

    def end_request(self) -> None:
        """The next byte belongs to the next request."""
        self.is_serving = False
        self.received_at = perf_counter() if self._head.lstrip(b"\r\n") else 0.0
        if not self._messages:
            self._newest = None

    @property
    def is_at_rest(self) -> bool:
        """Whether nothing of it is in this process: no request, not the beginning of one, no unsent answer."""
        transport = self.transport
        return (
            self.is_idle
            and self._waiter is not None  # aiohttp's own state: it waits for a request, and has none queued
            and not self._messages
            and not self._is_deaf
            and transport is not None
            and not transport.is_closing()
            and not transport.get_write_buffer_size()
        )

    @property
    def fd(self) -> int:
        """The socket's descriptor; -1 when it is closed."""
        transport = self.transport
        return -1 if transport is None or transport.is_closing() else transport.get_extra_info("socket").fileno()

    @property
    def has_unread(self) -> bool:
        """Whether the client has sent something that the event loop has not seen yet."""
        try:
            answer = fcntl.ioctl(self.fd, termios.FIONREAD, _UNREAD.pack(0))
        except (OSError, ValueError):  # closed
            return False
        return int.from_bytes(answer, sys.byteorder) > 0

    @property
    def is_idle(self) -> bool:
        """Whether no byte of a request has come since the last answer."""
        return not self.is_serving and not self.received_at

    def expire_head(self, moment: float, head_seconds: float) -> None:
        """Refuse a head that was begun so long ago and is still not whole."""
        is_being_read = not self.is_serving and not self._is_deaf and self.received_at > 0.0 and not self._messages
        if is_being_read and moment - self.received_at > head_seconds:
            self.fail(RequestTimeout("The request's head did not arrive in time."))

    async def linger(self) -> None:
        """After the last answer: read on and drop it, so that the client can read why before the connection goes.

        Closing a socket that has unread bytes resets the connection, and a reset overtakes the answer.
        """
        self._is_deaf = True
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        if transport.can_write_eof():
            with contextlib.suppress(OSError):  # a peer that did not wait has reset it
                transport.write_eof()
        self._resume_transport_reading()
        await asyncio.sleep(LINGER_SECONDS)

    def log_exception(self, *_args: Any, exc_info: BaseException | None = None, **_options: Any) -> None:
        """What aiohttp would log, without its text: that can quote the client."""
        log.error("connection failed", extra={"error_type": type(exc_info).__name__})


def _translate(err_info: _ErrInfo) -> RequestError:
    if isinstance(err_info.exc, RequestError):
        return err_info.exc
    # aiohttp has no class of its own for too many fields
    if isinstance(err_info.exc, LineTooLong) or err_info.message.startswith("Too many headers"):
        return HeadersTooLarge()
    return ValidationFailed("The request is not valid HTTP/1.1.")


def _find_fault_on_the_wire(received: bytes) -> RequestError | None:
    """What only the bytes show: a head's true size, and the protocols that are named."""
    head = received.lstrip(b"\r\n")
    end = head.find(b"\r\n\r\n")
    if len(received) - len(head) + end > MAX_HEAD_BYTES:
        return HeadersTooLarge()
    if any(protocol in received for protocol in _OTHER_PROTOCOLS):
        return ValidationFailed("The request is not HTTP/1.1 or HTTP/1.0.")
    return None
