"""What ibex reads of a chat request, and how a directive is woven into it; every other value stays the client's bytes.

A body is taken apart at its top level into raw values, in order, and put together again. A value ibex does not act on
is never decoded, so numbers, escapes and unknown fields reach the provider as the client wrote them. Searching the
bytes for `"messages":[` instead would be a bypass: that text can stand inside a string, and a second `messages` key
wins in the provider's parser.
"""

import re
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import Raw

from ibex.domain.directives import Directive, DirectiveMode
from ibex.errors import FieldError, InvalidJson, ValidationFailed

MAX_MESSAGES = 1000
MAX_MODEL_LENGTH = 256
MAX_DEPTH = 128
MAX_FIELDS = 1000

_ACTED_ON = frozenset({"messages", "model", "stream", "stream_options"})
_TRUE, _FALSE, _NULL = b"true", b"false", b"null"

_read_object = msgspec.json.Decoder(dict[str, Raw]).decode
_read_array = msgspec.json.Decoder(list[Raw]).decode
_read_string = msgspec.json.Decoder(str).decode

_MEMBER = re.compile(rb'[ \t\n\r]*("[^"\\]*(?:\\.[^"\\]*)*")[ \t\n\r]*:[ \t\n\r]*', re.DOTALL)
_SEPARATOR = re.compile(rb"[ \t\n\r]*[,}]")
_EMPTY_PAIR = re.compile(rb"\[\]|\{\}")
_SCALAR = re.compile(rb"[^,}\]\s]*")
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


class _Message(msgspec.Struct):
    role: Raw = Raw(b"null")  # unread: `1e400` is a number that JSON allows and Python does not hold


_read_message = msgspec.json.Decoder(_Message).decode


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A chat request, read as far as ibex acts on it."""

    model: str
    is_streaming: bool
    asks_for_usage: bool
    """Whether the client itself asked for `stream_options.include_usage`."""
    messages: bytes
    """The messages as the client wrote them: a JSON array of objects."""
    fields: tuple[tuple[bytes, bytes], ...]
    """Every top-level field: its key as the client spelled it, quotes included, and its raw value."""

    def __repr__(self) -> str:
        return f"ChatRequest(model=…, is_streaming={self.is_streaming})"


def read_chat(body: bytes) -> ChatRequest:
    """Read a request body.

    Raises InvalidJson for what is not JSON in UTF-8, nested at most 128 deep, and ValidationFailed for a field that is
    missing, wrong, or given in a way that another parser could read differently.
    """
    values = _take_apart(body)
    fields = _in_order(body, values)
    messages = _check_messages(values.get("messages"))
    model = _check_model(values.get("model"))
    is_streaming = _check_stream(values.get("stream"))
    asks_for_usage = _asks_for_usage(values.get("stream_options"))
    return ChatRequest(model, is_streaming, asks_for_usage, messages, fields)


def weave(request: ChatRequest, directive: Directive | None, *, ask_usage: bool) -> bytes:
    """The body for the provider: the client's, with the directive woven in and, for a stream, usage asked for."""
    messages = request.messages if directive is None else _weave_messages(request.messages, directive)
    wants_usage = ask_usage and request.is_streaming and not request.asks_for_usage
    parts = []
    for key, value in request.fields:
        if key == b'"messages"':
            parts.append(key + b":" + messages)
        elif key == b'"stream_options"' and wants_usage:
            continue
        else:
            parts.append(key + b":" + value)
    if wants_usage:
        parts.append(b'"stream_options":' + _ask_for_usage(request))
    return b"{" + b",".join(parts) + b"}"


def _take_apart(body: bytes) -> dict[str, Raw]:
    try:
        body.decode()
        if body.count(b"[") + body.count(b"{") > MAX_DEPTH and _is_too_deep(body):
            raise InvalidJson(f"The body is nested more than {MAX_DEPTH} levels deep.")
        return _read_object(body)
    except UnicodeDecodeError:
        raise InvalidJson("The body is not valid UTF-8.") from None
    except msgspec.ValidationError:
        raise ValidationFailed("The body must be a JSON object.") from None
    except (msgspec.DecodeError, RecursionError):
        raise InvalidJson from None


def _is_too_deep(body: bytes) -> bool:
    """Whether brackets outside strings are nested too deep: peel off the innermost pairs, level by level."""
    outside_strings = body.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')[::2]
    brackets = b"".join(outside_strings).translate(None, _NOT_BRACKETS)
    for _ in range(MAX_DEPTH):
        peeled = _EMPTY_PAIR.sub(b"", brackets)
        if len(peeled) == len(brackets):
            return False  # nothing left, or brackets that do not match, which the decoder will explain
        brackets = peeled
    return bool(brackets)


def _in_order(body: bytes, values: dict[str, Raw]) -> tuple[tuple[bytes, bytes], ...]:
    """The top level's keys, as spelled, with their values; of a key given twice the last.

    The decoder has checked the syntax and knows the last value of each key. Walking the body with these values finds
    the spelling of each key, and any key given twice: there the value at hand is another one, or the key is known.
    """
    if len(values) > MAX_FIELDS:
        raise ValidationFailed(f"The body has more than {MAX_FIELDS} top-level fields.")
    pairs = [(b'"%b"' % name.encode(), bytes(value)) for name, value in values.items()]
    if sum([len(key) + len(value) + 2 for key, value in pairs]) + 1 == len(body):
        # These with their colons and commas are the whole body, to the byte: so no key was given twice or has an
        # escape, either of which would have made it longer, and there is no white space. Most clients write so.
        return tuple(pairs)
    found: dict[str, tuple[bytes, bytes]] = {}
    position = body.index(b"{") + 1
    while (member := _MEMBER.match(body, position)) is not None:
        spelling = member[1]
        name = spelling[1:-1].decode() if b"\\" not in spelling else _read_string(spelling)
        value = bytes(values[name])
        start, end = member.end(), member.end() + len(value)
        separator = _SEPARATOR.match(body, end) if body.startswith(value, start) else None
        if name in _ACTED_ON and (name in found or separator is None or b"\\" in spelling):
            raise _field_error(name, "ambiguous", f"`{name}` must be given once, and without escapes in its name.")
        if separator is None:
            separator = _SEPARATOR.match(body, _skip_value(body, start))
        found[name] = (spelling, value)
        position = separator.end() if separator is not None else len(body)
    return tuple(found.values())


def _skip_value(body: bytes, start: int) -> int:
    """The end of the value that starts here; only needed for an earlier value of a key given twice."""
    if body[start : start + 1] not in {b"[", b"{", b'"'}:
        scalar = _SCALAR.match(body, start)
        return scalar.end() if scalar is not None else start
    depth = 0
    for match in _TOKEN.finditer(body, start):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(match[0], 0)
        if depth == 0:
            return match.end()
    raise InvalidJson


def _check_messages(raw: Raw | None) -> bytes:
    if raw is None:
        raise _field_error("messages", "required", "`messages` is required.")
    messages = bytes(raw)
    if messages[:1] != b"[":
        raise _field_error("messages", "type", "`messages` must be an array.")
    items = _read_array(messages)
    if not 1 <= len(items) <= MAX_MESSAGES:
        raise _field_error("messages", "length", f"`messages` must hold 1 to {MAX_MESSAGES} messages.")
    for index, item in enumerate(items):
        if bytes(memoryview(item)[:1]) != b"{":
            raise _field_error(f"messages[{index}]", "type", "A message must be an object.")
    return messages


def _check_model(raw: Raw | None) -> str:
    if raw is None:
        raise _field_error("model", "required", "`model` is required.")
    value = bytes(raw)
    if value[:1] != b'"':
        raise _field_error("model", "type", "`model` must be a string.")
    model = _read_string(value)
    if not 1 <= len(model) <= MAX_MODEL_LENGTH:
        raise _field_error("model", "length", f"`model` must be 1 to {MAX_MODEL_LENGTH} characters.")
    return model


def _check_stream(raw: Raw | None) -> bool:
    value = _FALSE if raw is None else bytes(raw)
    if value not in {_TRUE, _FALSE, _NULL}:
        raise _field_error("stream", "type", "`stream` must be true or false.")
    return value == _TRUE


def _asks_for_usage(raw: Raw | None) -> bool:
    value = _NULL if raw is None else bytes(raw)
    if value == _NULL:
        return False
    if value[:1] != b"{":
        raise _field_error("stream_options", "type", "`stream_options` must be an object.")
    return bytes(_read_object(value).get("include_usage", Raw(_FALSE))) == _TRUE


def _field_error(field: str, code: str, message: str) -> ValidationFailed:
    return ValidationFailed(message, param=field, field_errors=[FieldError(field, code, message)])


def _ask_for_usage(request: ChatRequest) -> bytes:
    given = next((value for key, value in request.fields if key == b'"stream_options"'), _NULL)
    options: dict[str, Any] = {} if given == _NULL else dict(_read_object(given))
    return msgspec.json.encode({**options, "include_usage": True})


def _weave_messages(messages: bytes, directive: Directive) -> bytes:
    match directive.mode:
        case DirectiveMode.SYSTEM_FIRST:
            return b"[" + directive.system_message + b"," + messages[1:]
        case DirectiveMode.SYSTEM_APPEND:
            items = _read_array(messages)
            return _splice(items, _leading_system_messages(items), 0, directive.system_message)
        case DirectiveMode.USER_PREPEND:
            return _prepend_to_user(_read_array(messages), directive)


def _read_role(message: Raw) -> str | None:
    role = bytes(_read_message(message).role)
    return _read_string(role) if role.startswith(b'"') else None


def _leading_system_messages(items: list[Raw]) -> int:
    return next((index for index, item in enumerate(items) if _read_role(item) != "system"), len(items))


def _splice(items: list[Raw], index: int, removed: int, message: bytes) -> bytes:
    parts = [*map(bytes, items[:index]), message, *map(bytes, items[index + removed :])]
    return b"[" + b",".join(parts) + b"]"


def _prepend_to_user(items: list[Raw], directive: Directive) -> bytes:
    """Put the directive before the first user message's text; without any user message, as one of its own."""
    index = next((index for index, item in enumerate(items) if _read_role(item) == "user"), None)
    if index is None:
        message = b'{"role":"user","content":"' + directive.prefix + b'"}'
        return _splice(items, _leading_system_messages(items), 0, message)
    fields = _read_object(items[index])
    content = bytes(fields.get("content", Raw(_NULL)))
    if content[:1] == b'"':
        content = b'"' + directive.prefix + content[1:]
    elif content[:1] == b"[":
        rest = content[1:].lstrip(b" \t\n\r")
        separator = b"" if rest == b"]" else b","
        content = b'[{"type":"text","text":"' + directive.prefix + b'"}' + separator + rest
    elif content == _NULL:
        content = b'"' + directive.prefix + b'"'
    else:
        field = f"messages[{index}].content"
        raise _field_error(field, "type", "`content` must be a string or an array of parts.")
    fields["content"] = Raw(content)
    return _splice(items, index, 1, msgspec.json.encode(fields))
