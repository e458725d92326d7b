"""The error map: what a provider's answer other than 200 means to a client of ibex."""

import math
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Final

import msgspec

from ibex.errors import InvalidRequest, ModelNotFound, ProviderTimeout, ProviderUnavailable, RateLimited, RequestError
from ibex.providers.redaction import sanitise

RETRIED: Final = frozenset({429, 500, 502, 503, 504})
"""Statuses after which the same request may be sent again."""
MAX_ERROR_BYTES: Final = 64 << 10
MAX_RETRY_AFTER: Final = 86_400
DEFAULT_RETRY_AFTER: Final = 1
"""Seconds for a 429 whose provider names none that is sensible: every 429 of ibex names some."""

_STREAM_USAGE: Final = re.compile(r"stream_options|include_usage")
_MODEL: Final = re.compile(r"\bmodel\b", re.IGNORECASE)
_DEFAULT_MESSAGE: Final = InvalidRequest.default_message()


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer that is no completion, as far as it could be read; nothing in it is sanitised yet."""

    status: int
    message: str = ""
    code: str = ""
    param: str = ""
    retry_after: float | None = None
    """Seconds the provider asks to wait."""

    @property
    def is_retryable(self) -> bool:
        """Whether the same request may be sent again."""
        return self.status in RETRIED

    @property
    def refuses_stream_usage(self) -> bool:
        """Whether the upstream stumbled over `stream_options.include_usage`."""
        return self.status in {400, 422} and bool(_STREAM_USAGE.search(f"{self.param} {self.message}"))

    @property
    def names_model(self) -> bool:
        """Whether a 404 is about the model, not about the path."""
        return self.code == "model_not_found" or self.param == "model" or bool(_MODEL.search(self.message))

    def to_error(self, forbidden: Iterable[str]) -> RequestError:
        """The error a client sees, its text sanitised (contract section 4)."""
        seconds = None if self.retry_after is None else math.ceil(self.retry_after)
        is_sensible = seconds is not None and 1 <= seconds <= MAX_RETRY_AFTER
        if self.status == 429:
            wait = seconds if is_sensible else DEFAULT_RETRY_AFTER
            return RateLimited("The model provider limits requests just now.", headers={"Retry-After": str(wait)})
        if self.status in {408, 504}:
            return ProviderTimeout()
        if self.status in {401, 403} or not 400 <= self.status < 500:
            passes_wait_on = self.status == 503 and is_sensible
            return ProviderUnavailable(headers={"Retry-After": str(seconds)} if passes_wait_on else None)
        message = sanitise(self.message, forbidden)
        if self.status != 404:
            param = sanitise(self.param, forbidden) or None
            return InvalidRequest(message or _DEFAULT_MESSAGE, status=self.status, param=param)
        if self.names_model:
            return ModelNotFound(message or None, param="model")
        return ProviderUnavailable()


def read_refusal(status: int, headers: Mapping[str, str], body: bytes) -> Refusal:
    """Read an error answer in any of the shapes OpenAI-compatible servers use; what cannot be read is left empty."""
    retry_after = parse_retry_after(headers.get("retry-after"))
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        found = None
    error = found.get("error", found) if isinstance(found, dict) else None
    if isinstance(error, str):
        error = {"message": error}
    if not isinstance(error, dict):
        return Refusal(status, retry_after=retry_after)
    message = error.get("message") or error.get("detail")
    if isinstance(message, list | dict):
        message = msgspec.json.encode(message).decode()
    return Refusal(status, _text(message), _text(error.get("code")), _text(error.get("param")), retry_after)


def parse_retry_after(value: str | None) -> float | None:
    """Seconds in a Retry-After, which may be a number or a date; None when there is none to be read."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
