"""An answer of a provider as its reader sees it: the head, then the body at the reader's own pace."""

import asyncio
from time import monotonic
from typing import Final, Protocol

from ibex.errors import ProviderUnavailable, RequestError
from ibex.providers.answer_reader import AnswerInvalid, AnswerReader

HIGH_WATER_BYTES: Final = 256 << 10
"""Body bytes held for a slow reader before the socket is no longer read."""


class ConnectionCut(ProviderUnavailable):
    """The model provider closed the connection before its answer was whole."""


class Source(Protocol):
    """Where an answer comes from."""

    def resume(self) -> None:
        """Read the socket again."""

    def abort(self) -> None:
        """Close the socket at once."""


class Answer:
    """An answer whose head has come. Whoever holds it reads it to the end or calls `abort`."""

    __slots__ = ("_error", "_limit", "_reader", "_source", "_waiter", "sent_at", "ttfb")

    def __init__(self, source: Source, sent_at: float) -> None:
        self.sent_at = sent_at
        """When the request was written (monotonic seconds)."""
        self.ttfb = 0.0
        """Seconds from the request to the first byte of the answer."""
        self._reader = AnswerReader()
        self._source: Source | None = source
        self._error: RequestError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._limit: int | None = None

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self._reader.status

    @property
    def headers(self) -> dict[str, str]:
        """Content type, openai-processing-ms, x-request-id and retry-after, where fit to be seen; lower-case names."""
        return self._reader.headers

    @property
    def is_coded(self) -> bool:
        """Whether the body has a Content-Encoding."""
        return self._reader.is_coded

    @property
    def is_complete(self) -> bool:
        """Whether the last byte has come, though perhaps not been read."""
        return self._reader.is_complete

    async def read(self, limit: int) -> bytes:
        """The whole body; raises ProviderUnavailable when it is cut or longer than `limit` bytes, ProviderTimeout when
        it stalls.
        """
        reader = self._reader
        if max(reader.size, reader.content_length or 0) > limit:
            self.abort()
            raise ProviderUnavailable("The model provider's answer is too large.")
        self._limit = limit
        if self._source is not None:
            self._source.resume()
        while not reader.is_complete and self._error is None:
            await self._wait()
        if self._error is not None:
            raise self._error
        return reader.take()

    def __aiter__(self) -> "Answer":
        return self

    async def __anext__(self) -> bytes:
        """The body bytes that have come, at least one; all that came before a failure is handed out first."""
        reader = self._reader
        while not reader.size:
            if self._error is not None:
                raise self._error
            if reader.is_complete:
                raise StopAsyncIteration
            await self._wait()
        data = reader.take()
        if self._source is not None:
            self._source.resume()
        return data

    def abort(self) -> None:
        """End the call at once; the connection is closed unless the answer was whole."""
        source, self._source = self._source, None
        if source is not None:
            self._error = ConnectionCut()
            source.abort()

    def release(self, seconds: float) -> None:
        """Nothing more of the body is wanted: keep the connection if its end comes within these seconds, in silence."""
        if self._source is not None:
            self._reader.take()
            self._limit = HIGH_WATER_BYTES
            self._source.resume()
            asyncio.get_running_loop().call_later(seconds, self.abort)

    # For the connection alone.

    async def wait_for_head(self) -> None:
        while not self._reader.status and self._error is None:
            await self._wait()
        if self._error is not None and not self._reader.status:
            raise self._error

    def receive(self, data: bytes) -> None:
        reader = self._reader
        if not reader.has_bytes:
            self.ttfb = monotonic() - self.sent_at
        reader.feed(data)
        if self._limit is None:
            if reader.status:
                self._wake()
        elif reader.is_complete:
            self._wake()
        elif reader.size > self._limit:
            raise AnswerInvalid("The model provider's answer is too large.")

    def detach(self, error: RequestError | None = None) -> None:
        """The connection has nothing more to give."""
        self._source = None
        self._error = error
        self._wake()

    @property
    def reader(self) -> AnswerReader:
        return self._reader

    @property
    def is_full(self) -> bool:
        return self._limit is None and self._reader.size > HIGH_WATER_BYTES

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        except asyncio.CancelledError:
            self.abort()
            raise
        finally:
            self._waiter = None
