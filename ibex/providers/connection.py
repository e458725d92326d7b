"""One connection to a provider: one request at a time, a bounded answer, deadlines, and an end at the first doubt."""

import asyncio
import random
import select
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import cast

from ibex.errors import ProviderTimeout, RequestError
from ibex.providers.answer import Answer, ConnectionCut
from ibex.providers.answer_reader import AnswerInvalid


class ConnectionStale(ConnectionCut):
    """A kept connection turned out to be closed before any byte of an answer came: the request may be sent again."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long to wait for a provider, in seconds."""

    connect: float = 5.0
    first_byte: float = 120.0
    """From the request to the end of the answer's head."""
    idle: float = 60.0
    """Between two bytes of an answer; the time a slow reader holds the socket back does not count."""
    total: float = 3600.0
    """From the request to the end of the answer."""
    keep: float = 30.0
    """How long a connection is kept without a request."""
    life: float = 120.0
    """How long a connection takes requests: the next one asks DNS again."""

    @property
    def period(self) -> float:
        """The longest time between two looks at the clock that never sees a deadline late."""
        return min(self.first_byte, self.idle, self.total, self.keep)


class Connection(asyncio.Protocol):
    """The protocol of one socket. `on_idle` is called when it may be asked again, `on_lost` when it is gone."""

    __slots__ = (
        "_answer",
        "_deadlines",
        "_is_paused",
        "_last_byte_at",
        "_on_idle",
        "_on_lost",
        "_poll",
        "_timer",
        "_transport",
        "_worn_at",
        "is_closed",
        "is_reused",
    )

    def __init__(
        self, deadlines: Deadlines, on_idle: Callable[["Connection"], None], on_lost: Callable[["Connection"], None]
    ) -> None:
        self.is_closed = False
        self.is_reused = False
        self._deadlines = deadlines
        self._on_idle = on_idle
        self._on_lost = on_lost
        self._answer: Answer | None = None
        self._is_paused = False
        self._last_byte_at = now = monotonic()
        # spread, so that connections made together are not made anew together
        self._worn_at = now + deadlines.life * random.uniform(0.9, 1.0)  # noqa: S311 (guards nothing)
        self._timer: asyncio.TimerHandle | None = None

    async def exchange(self, request: bytes) -> Answer:
        """Send one request and wait for the head of its answer.

        Raises ConnectionStale when this was a reused connection and no byte came before its end, AnswerInvalid,
        ConnectionCut or ProviderTimeout else. Cancellation closes the connection at once.
        """
        self._last_byte_at = now = monotonic()
        answer = Answer(self, now)
        if self.is_closed:
            raise self._cut(answer)
        self._answer = answer
        self._transport.write(request)
        await answer.wait_for_head()
        return answer

    def is_quiet(self) -> bool:
        """Whether the socket has neither bytes nor an end to read: nobody asked for any."""
        return not (self.is_closed or self._poll(0))

    @property
    def is_worn(self) -> bool:
        """Whether it has lived too long to take another request."""
        return monotonic() >= self._worn_at

    def abort(self) -> None:
        """Close at once, whatever is under way."""
        self.is_closed = True
        self._transport.abort()

    def resume(self) -> None:
        """Read the socket again after a reader was slow."""
        if self._is_paused and not self.is_closed:
            self._is_paused = False
            self._last_byte_at = monotonic()
            self._transport.resume_reading()

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        poller = select.poll()
        poller.register(transport.get_extra_info("socket").fileno(), select.POLLIN)
        self._poll = poller.poll
        self._timer = asyncio.get_running_loop().call_later(self._deadlines.period, self._look_at_clock)

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        if answer is None:
            self.abort()
            return
        self._last_byte_at = monotonic()
        try:
            answer.receive(data)
        except AnswerInvalid as error:
            self._fail(error)
            return
        if answer.reader.is_complete:
            self._finish(answer)
        elif answer.is_full and not self._is_paused:
            self._is_paused = True
            self._transport.pause_reading()

    def eof_received(self) -> None:
        self._end(None)
        self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._end(exc)
        self._on_lost(self)

    def _finish(self, answer: Answer) -> None:
        self._answer = None
        # An answer may come before its request has been sent; the rest of that would then be the next one's beginning.
        is_reusable = answer.reader.is_reusable and not self._transport.get_write_buffer_size() and not self.is_closed
        if is_reusable:
            self.resume()
            self.is_reused = True
            self._on_idle(self)
        else:
            self.abort()
        answer.detach()

    def _fail(self, error: RequestError) -> None:
        answer, self._answer = self._answer, None
        self.abort()
        if answer is not None:
            answer.detach(error)

    def _end(self, exc: Exception | None) -> None:
        """The socket has ended: cleanly (None), or broken."""
        answer, self._answer = self._answer, None
        if answer is None:
            return
        error: RequestError | None = None
        try:
            if exc is not None:
                raise AnswerInvalid
            answer.reader.feed_eof()
        except AnswerInvalid:
            error = self._cut(answer)
            error.__cause__ = exc
        answer.detach(error)

    def _cut(self, answer: Answer) -> ConnectionCut:
        return ConnectionStale() if self.is_reused and not answer.reader.has_bytes else ConnectionCut()

    def _look_at_clock(self) -> None:
        """Find whether a deadline has passed, and look again when the next one may.

        One timer serves the connection's whole life: a deadline set after this look is never nearer than the period.
        """
        deadlines, now = self._deadlines, monotonic()
        answer = self._answer
        if answer is None:
            deadline = self._last_byte_at + deadlines.keep
        elif not answer.reader.status:
            deadline = answer.sent_at + deadlines.first_byte
        elif self._is_paused:
            deadline = answer.sent_at + deadlines.total
        else:
            deadline = min(self._last_byte_at + deadlines.idle, answer.sent_at + deadlines.total)
        if now < deadline:
            wait = min(deadline - now, deadlines.period)
            self._timer = asyncio.get_running_loop().call_later(wait, self._look_at_clock)
            return
        self._timer = None
        self._fail(ProviderTimeout())
