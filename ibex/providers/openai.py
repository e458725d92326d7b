"""OpenAI, and all that speak its dialect."""

import asyncio
import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from time import monotonic
from typing import Final
from urllib.parse import urlsplit

from ibex import __version__
from ibex.config import Secret, Settings
from ibex.errors import InvalidRequest, ModelNotFound, ProviderTimeout, ProviderUnavailable, RequestError
from ibex.providers.answer import Answer
from ibex.providers.base import ProviderCall, ProviderReply
from ibex.providers.connection import Deadlines
from ibex.providers.models import MAX_LIST_BYTES, Model, read_models
from ibex.providers.proxies import Proxy, is_exempt, parse_proxy
from ibex.providers.refusals import MAX_ERROR_BYTES, Refusal, read_refusal
from ibex.providers.retries import RetryBudget
from ibex.providers.transport import ConnectFailed, ConnectTimedOut, Headers, Transport, make_ssl_context
from ibex.telemetry import Metrics

log = logging.getLogger("ibex.providers")

CHAT_PATH: Final = "/chat/completions"
MODELS_PATH: Final = "/models"

_ERROR_BODY_SECONDS: Final = 5.0


class OpenAI:
    """One upstream under one key. What it is asked goes to the configured base URL, whatever a body says."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        *,
        base_url: str,
        api_key: Secret | None,
        name: str = "openai",
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """Raises ValueError when the base URL or the proxy's is none, when there is no file of authorities where one is
        named, or when the key cannot stand in a header.
        """
        self.name = name
        self.accepts_stream_usage = settings.openai_stream_usage == "ask"
        self._models = settings.openai_models
        self._retries = settings.provider_retries
        self._wait_seconds = settings.provider_retry_wait_seconds
        deadlines = Deadlines(
            connect=settings.provider_connect_seconds,
            first_byte=settings.provider_first_byte_seconds,
            idle=settings.provider_idle_seconds,
            total=settings.stream_max_seconds,
            life=settings.provider_connection_seconds,
        )
        if ssl_context is None and base_url.startswith("https:"):
            ssl_context = make_ssl_context(settings.ssl_cert_file)
        self._transport = Transport(
            base_url,
            deadlines=deadlines,
            ssl_context=ssl_context,
            proxy=_choose_proxy(settings, base_url),
        )
        self._requests_total = metrics.provider_requests_total
        self._retries_total = metrics.provider_retries_total.labels(name)
        self._ttfb_seconds = metrics.provider_ttfb_seconds.labels(name)
        self._observe_duration = metrics.provider_duration_seconds.labels(name).observe
        self.is_away = False
        """Whether the last call found nobody who answers (no connection, no answer in time, a 5xx)."""
        self._is_refused = False
        self.set_api_key(api_key)

    def set_api_key(self, api_key: Secret | None) -> None:
        """Present this key from the next request on; raises ValueError when it cannot stand in a header."""
        key = api_key.get_secret_value() if api_key is not None else ""
        fields = [(b"Accept-Encoding", b"identity"), (b"User-Agent", b"ibex/" + __version__.encode())]
        if key:
            fields.append((b"Authorization", b"Bearer " + key.encode()))
        self._forbidden = (key,) if key else ()
        self._models_head = self._transport.prepare("GET", MODELS_PATH, [*fields, (b"Accept", b"application/json")])
        fields.insert(0, (b"Content-Type", b"application/json"))
        self._json_head = self._transport.prepare("POST", CHAT_PATH, [*fields, (b"Accept", b"application/json")])
        self._stream_head = self._transport.prepare("POST", CHAT_PATH, [*fields, (b"Accept", b"text/event-stream")])

    def serves(self, model: str) -> bool:
        """Whether one of the configured globs matches the model."""
        return any(pattern == "*" or fnmatchcase(model, pattern) for pattern in self._models)

    async def complete(self, call: ProviderCall) -> ProviderReply:
        """Ask for a completion, again if need be; raises the errors of contract section 4, `attempts` set.

        Cancellation ends the call at once.
        """
        body, make_other_body = call.body, call.make_body_without_usage
        if not self.accepts_stream_usage and make_other_body is not None:
            body, make_other_body = make_other_body(), None
        answered = await self._ask(
            self._stream_head if call.is_streaming else self._json_head,
            body,
            call.trace_headers,
            forbidden=self._forbidden + call.redact,
            make_other_body=make_other_body,
        )
        self._check_kind(call, answered)
        if answered.is_other_body:
            self.accepts_stream_usage = False
        return ProviderReply(
            answered.answer,
            attempts=answered.attempts,
            has_usage_asked=body is call.body and not answered.is_other_body,
            forbidden=self._forbidden + call.redact,
            on_end=self._observe_duration,
        )

    async def list_models(self) -> tuple[Model, ...]:
        """The models the upstream says it has, of those that the globs match.

        Raises ProviderUnavailable, ProviderTimeout or RateLimited: an upstream without such a list is no fault of the
        client's.
        """
        try:
            answered = await self._ask(self._models_head, None)
            body = await answered.answer.read(MAX_LIST_BYTES)
        except (InvalidRequest, ModelNotFound):
            raise ProviderUnavailable("The model provider did not tell its models.") from None
        self._observe_duration(monotonic() - answered.answer.sent_at)
        return read_models(b"" if answered.answer.is_coded else body, self.serves, owner=self.name)

    async def close(self) -> None:
        """Close every connection."""
        await self._transport.close()

    async def _ask(
        self,
        head: bytes,
        body: bytes | None,
        fields: Headers = (),
        *,
        forbidden: tuple[str, ...] = (),
        make_other_body: Callable[[], bytes] | None = None,
    ) -> "_Answered":
        """Send a request until it is answered with 200 or there is no use in sending it again.

        `make_other_body` is asked for a body without `stream_options` when the upstream stumbles over that.
        """
        budget = RetryBudget(self._retries, self._wait_seconds)
        attempts, is_other_body = 0, False
        while True:
            attempts += 1
            retry_after: float | None = None
            try:
                answer = await self._send(head, body, fields)
                if answer.status == 200:
                    return _Answered(answer, attempts, is_other_body)
                refusal = await self._read_refusal(answer)
                if make_other_body is not None and not is_other_body and refusal.refuses_stream_usage:
                    body, is_other_body = make_other_body(), True
                    continue
                failure, is_retryable, retry_after = (
                    refusal.to_error(forbidden),
                    refusal.is_retryable,
                    refusal.retry_after,
                )
            except (ProviderUnavailable, ProviderTimeout) as error:
                failure, is_retryable = error, isinstance(error, ConnectFailed | ConnectTimedOut)
            wait = budget.take(retry_after) if is_retryable else None
            if wait is None:
                failure.attempts = attempts
                raise failure
            self._retries_total.inc()
            await asyncio.sleep(wait)

    async def _send(self, head: bytes, body: bytes | None, fields: Headers) -> Answer:
        try:
            answer = await self._transport.send(head, body, fields)
        except RequestError as error:
            self.is_away = True
            outcome = "timeout" if isinstance(error, ProviderTimeout) else "error"
            self._requests_total.labels(self.name, outcome).inc()
            raise
        self.is_away = answer.status >= 500
        self._note_key(is_refused=answer.status in {401, 403})
        self._requests_total.labels(self.name, f"{answer.status // 100}xx").inc()
        self._ttfb_seconds.observe(answer.ttfb)
        return answer

    def _note_key(self, *, is_refused: bool) -> None:
        """Say once that the upstream refuses ibex: its clients only hear that the provider is unavailable."""
        if is_refused and not self._is_refused:
            log.warning("the provider refuses the key, or what it may do", extra={"provider": self.name})
        self._is_refused = is_refused

    def _check_kind(self, call: ProviderCall, answered: "_Answered") -> None:
        answer = answered.answer
        media_type = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
        if answer.is_coded or (media_type == "text/event-stream") is not call.is_streaming:
            answer.abort()
            error = ProviderUnavailable("The model provider's answer is not of the kind that was asked for.")
            error.attempts = answered.attempts
            raise error

    async def _read_refusal(self, answer: Answer) -> Refusal:
        """Read an error answer within bounds; its status counts even if its text cannot be read."""
        body = b""
        try:
            async with asyncio.timeout(_ERROR_BODY_SECONDS):
                body = await answer.read(MAX_ERROR_BYTES)
        except (TimeoutError, ProviderUnavailable, ProviderTimeout):
            answer.abort()
        self._observe_duration(answer.ttfb)
        return read_refusal(answer.status, answer.headers, b"" if answer.is_coded else body)


def _choose_proxy(settings: Settings, base_url: str) -> Proxy | None:
    """The egress proxy, unless this upstream is exempt from it."""
    url = urlsplit(base_url)
    if settings.https_proxy is None or is_exempt(url.hostname or "", url.port or 443, settings.no_proxy):
        return None
    return parse_proxy(settings.https_proxy.get_secret_value())


@dataclass(frozen=True, slots=True)
class _Answered:
    """A 200, after so many attempts."""

    answer: Answer
    attempts: int
    is_other_body: bool
    """Whether it answers the body without `stream_options`."""
