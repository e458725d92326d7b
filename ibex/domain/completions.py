"""What ibex reads of a provider's reply: token usage, and whether a stream is whole. The bytes themselves pass by."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import msgspec

_MAX_TOKENS = 2**53
_DONE = b"[DONE]"


@dataclass(frozen=True, slots=True)
class Usage:
    """Language tokens of one turn, as the provider counted them; None is unknown, never 0."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    total_tokens: int | None = None

    @property
    def source(self) -> str:
        """`provider`, or `none` when nothing is known."""
        return "none" if self == _UNKNOWN else "provider"


_UNKNOWN = Usage()


@dataclass(frozen=True, slots=True)
class ReplyFacts:
    """What a reply says of itself, as the provider's text: for spans. None: it does not say."""

    completion_id: str | None
    model: str | None
    finish_reasons: tuple[str, ...]


class _Completion(msgspec.Struct, gc=False):
    usage: Any = None


class _Choice(msgspec.Struct, gc=False):
    index: Any = 0
    finish_reason: Any = None


class _Named(msgspec.Struct, gc=False):
    id: Any = None
    model: Any = None
    choices: list[_Choice] | None = None


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: Any = None
    error: Any = None


class _Failure(msgspec.Struct, gc=False):
    error: Any = None


_read_completion = msgspec.json.Decoder(_Completion).decode
_read_chunk = msgspec.json.Decoder(_Chunk).decode
_read_failure = msgspec.json.Decoder(_Failure).decode
_read_named = msgspec.json.Decoder(_Named).decode


def read_usage(body: bytes) -> Usage:
    """The usage in a whole JSON reply; unknown when the body is not a JSON object or says nothing sensible."""
    try:
        return _to_usage(_read_completion(body).usage)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return _UNKNOWN


def read_reply_facts(data: bytes, finish_reasons: Iterable[Any] | None = None) -> ReplyFacts:
    """What a whole JSON reply, or an event of a stream whose `finish_reasons` are known, says of itself."""
    try:
        named = _read_named(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        named = _Named()
    if finish_reasons is None:
        finish_reasons = [choice.finish_reason for choice in named.choices or ()]
    return ReplyFacts(
        completion_id=named.id if isinstance(named.id, str) else None,
        model=named.model if isinstance(named.model, str) else None,
        finish_reasons=tuple(reason for reason in finish_reasons if isinstance(reason, str)),
    )


def _to_usage(value: Any) -> Usage:
    if not isinstance(value, dict):
        return _UNKNOWN
    details = value.get("prompt_tokens_details")
    return Usage(
        input_tokens=_count(value.get("prompt_tokens")),
        output_tokens=_count(value.get("completion_tokens")),
        cached_tokens=_count(details.get("cached_tokens")) if isinstance(details, dict) else None,
        total_tokens=_count(value.get("total_tokens")),
    )


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value <= _MAX_TOKENS else None


class Fate(Enum):
    """What becomes of one event of a stream."""

    RELAY = auto()
    """The client gets its bytes."""
    HIDE = auto()
    """The usage chunk that ibex alone asked for: left out."""
    DONE = auto()
    """`[DONE]`: the end, whatever follows."""
    FAIL = auto()
    """An `error` item: the stream has failed, whatever follows."""


class StreamReader:
    """Follows one stream, event by event: its usage, and whether what has come so far is a whole reply."""

    __slots__ = ("_begun", "_finished", "_hides_usage", "error", "is_done", "newest", "usage")

    def __init__(self, *, hides_usage: bool) -> None:
        self._hides_usage = hides_usage
        self._begun: set[int] = set()
        self._finished: dict[int, Any] = {}
        """Why each choice that has ended did."""
        self.is_done = False
        self.usage = _UNKNOWN
        self.error: Any = None
        """The provider's own error object, once an event has carried one."""
        self.newest = b""
        """The data of the last event but `[DONE]`."""

    @property
    def is_whole(self) -> bool:
        """Whether the provider said `[DONE]`, or gave every choice it began a `finish_reason`."""
        return self.is_done or (bool(self._begun) and self._begun == self._finished.keys())

    def take(self, data: bytes | None) -> Fate:
        """Judge an event by its data (None for one without any, such as a comment)."""
        if data is None:
            return Fate.RELAY
        if data.strip() == _DONE:
            self.is_done = True
            return Fate.DONE
        self.newest = data
        chunk = _read_event(data)
        if chunk.error is not None:
            self.error = chunk.error
            return Fate.FAIL
        for choice in chunk.choices or ():
            self._follow(choice)
        if isinstance(chunk.usage, dict):
            self.usage = _to_usage(chunk.usage)
            if self._hides_usage and chunk.choices == []:
                return Fate.HIDE
        return Fate.RELAY

    def _follow(self, choice: _Choice) -> None:
        index = choice.index if isinstance(choice.index, int) else 0
        self._begun.add(index)
        if choice.finish_reason is not None:
            self._finished[index] = choice.finish_reason

    def facts(self) -> ReplyFacts:
        """What the reply has said of itself; every chunk repeats its id and model."""
        return read_reply_facts(self.newest, [reason for _, reason in sorted(self._finished.items())])


def _read_event(data: bytes) -> _Chunk:
    """An event's JSON, as far as it has the shape of a chunk; even in a strange one an `error` is seen."""
    try:
        return _read_chunk(data)
    except msgspec.ValidationError:
        pass
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return _Chunk()
    try:
        return _Chunk(error=_read_failure(data).error)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return _Chunk()
