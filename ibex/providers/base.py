"""What a provider is: it takes a call, and answers with a reply of the right kind or one of the contract's errors."""

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from time import monotonic, time_ns
from typing import Final, Protocol

from ibex.errors import RequestError
from ibex.providers.answer import Answer
from ibex.providers.events import EventSplitter
from ibex.providers.models import Model
from ibex.providers.redaction import sanitise

MAX_JSON_BYTES: Final = 64 << 20
RELEASE_SECONDS: Final = 1.0
"""How long the end of a stream that is whole may take to come, so that its connection can be kept."""


@dataclass(slots=True, eq=False)
class ProviderCall:
    """One chat request on its way to a provider. `repr` shows none of its content."""

    body: bytes
    is_streaming: bool
    trace_headers: tuple[tuple[bytes, bytes], ...] = ()
    """Trace context and OpenAI-Beta: all that rides along of the client's headers."""
    redact: tuple[str, ...] = ()
    """Texts that must not come back in an error (the directive's)."""
    make_body_without_usage: Callable[[], bytes] | None = None
    """Makes the body for an upstream that refuses `stream_options.include_usage`, if it was ibex that asked for it."""

    def __repr__(self) -> str:
        return f"ProviderCall({len(self.body)} bytes, is_streaming={self.is_streaming})"


class ProviderReply:
    """A 200 of the right kind; nothing of its body has been read. Whoever holds it ends with `release` or `abort`."""

    __slots__ = (
        "_answer",
        "_forbidden",
        "_on_end",
        "attempts",
        "ended_at",
        "ended_cleanly",
        "has_usage_asked",
        "headers",
        "provider_request_id",
        "started_at",
        "ttfb",
        "unfinished",
    )

    def __init__(
        self,
        answer: Answer,
        *,
        attempts: int,
        has_usage_asked: bool,
        forbidden: tuple[str, ...],
        on_end: Callable[[float], None],
    ) -> None:
        self._answer = answer
        self._forbidden = forbidden
        self._on_end = on_end
        found = answer.headers
        self.headers = {"Content-Type": found.get("content-type", "application/json")}
        """What a client may see of the provider's head, under the names of ibex's own response."""
        self.provider_request_id = found.get("x-request-id")
        if self.provider_request_id is not None:
            self.headers["X-Provider-Request-ID"] = self.provider_request_id
        if "openai-processing-ms" in found:
            self.headers["openai-processing-ms"] = found["openai-processing-ms"]
        self.attempts = attempts
        self.has_usage_asked = has_usage_asked
        """False when the body without it was what the upstream took."""
        self.started_at = time_ns() // 1000 - round((monotonic() - answer.sent_at) * 1e6)
        """When the request that was answered was sent (Unix microseconds)."""
        self.ttfb = answer.ttfb
        """Seconds from then to the answer's first byte."""
        self.ended_at: float | None = None
        """When the reply ended, however (monotonic seconds)."""
        self.ended_cleanly = False
        """Whether the body came to its own end; a stream may be whole before that (contract section 4)."""
        self.unfinished = b""
        """Bytes of a last event that never became whole."""

    async def read(self, limit: int = MAX_JSON_BYTES) -> bytes:
        """The whole body, verbatim; raises ProviderUnavailable when it is cut or too large, ProviderTimeout."""
        try:
            body = await self._answer.read(limit)
        except RequestError as error:
            error.attempts = self.attempts
            raise
        finally:
            self._end()
        self.ended_cleanly = True
        return body

    async def events(self) -> AsyncGenerator[list[bytes], None]:
        """Whole events, their bytes verbatim, the moment they are whole: one list a read of the socket.

        Raises ProviderUnavailable or ProviderTimeout when the stream breaks, after every whole event was handed out.
        """
        splitter = EventSplitter()
        failure: RequestError | None = None
        try:
            async for data in self._answer:
                if events := splitter.feed(data):
                    yield events
        except RequestError as error:
            error.attempts = self.attempts
            failure = error
        if events := splitter.finish():
            yield events
        self.unfinished = splitter.rest
        self.ended_cleanly = failure is None
        self._end()
        if failure is not None:
            self.abort()
            raise failure

    def release(self) -> None:
        """Nothing more is wanted, the reply being whole: keep the connection if the body's end comes soon."""
        self._answer.release(RELEASE_SECONDS)
        self._end()

    def abort(self) -> None:
        """End the call at once; harmless after the end."""
        self._answer.abort()
        self._end()

    def clean_text(self, text: str) -> str:
        """A text of the provider's, fit for the client: for the `error` items of a stream."""
        return sanitise(text, self._forbidden)

    def _end(self) -> None:
        if self.ended_at is None:
            self.ended_at = monotonic()
            self._on_end(self.ended_at - self._answer.sent_at)


class Provider(Protocol):
    """A vendor of models."""

    @property
    def name(self) -> str:
        """What metrics, traces and checkpoints call it."""

    @property
    def accepts_stream_usage(self) -> bool:
        """Whether `stream_options.include_usage` may be asked for on ibex's own account."""

    def serves(self, model: str) -> bool:
        """Whether this provider serves the model."""

    async def complete(self, call: ProviderCall) -> ProviderReply:
        """Ask for a completion; raises the errors of contract section 4 with `attempts` set, after all retries."""

    async def list_models(self) -> tuple[Model, ...]:
        """The models it says it has, of those that it serves.

        Raises ProviderUnavailable, ProviderTimeout or RateLimited.
        """
