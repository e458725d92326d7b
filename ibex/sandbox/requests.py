"""What the sandbox reads of a chat request, and what a request can ask of the sandbox."""

import re
from typing import Any, Final, Literal

import msgspec

RawEnd = Literal["close", "keep", "hang", "reset", "half_close"]

_EXACTLY: Final = re.compile(r"Reply with exactly:[ \t]*([^\r\n]+)")
_UNKNOWN_MODEL: Final = "no-such-model"


class Controls(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The trouble a request asks for. Without any, the answer is quick and whole."""

    text: str | None = None
    """Answer with this text."""
    delay_ms: float = 0.0
    """Wait before the answer's head."""
    gap_ms: float | None = None
    """Wait between two events; default: the sandbox's own gap."""
    events: int | None = None
    """How many content events a choice has."""
    event_bytes: int | None = None
    """How large each content event's text is."""
    status: int | None = None
    """Fail with this status …"""
    times: int | None = None
    """… so many times for this `key`, then answer and start anew; default: always."""
    key: str = ""
    """What `times` counts by; default: the body."""
    retry_after: str | None = None
    error: Any = None
    """The error object of a failure, in place of a fitting one; a text is sent as the whole body."""
    cut_after: int | None = None
    """Break the connection after so many events, or bytes of a JSON body; -1: before the head."""
    cut_at_byte: int | None = None
    """Break the connection after so many bytes of a stream's events."""
    hang_after: int | None = None
    """Say nothing more, likewise."""
    error_after: int | None = None
    """After so many events, an item with an `error`; then the stream ends cleanly."""
    no_done: bool = False
    """End the stream without `[DONE]`."""
    comments: int = 0
    """Comment lines before each event."""
    line_end: str = "\n"
    usage: Any = msgspec.UNSET
    """The usage, whatever it is."""
    body: str | None = None
    """The whole body of a 200."""
    content_type: str | None = None
    headers: dict[str, str] = {}
    refuse_stream_options: bool = False
    """Know no `stream_options`."""
    piece_bytes: int | None = None
    """Write a body in pieces of this size, the gap between two."""
    raw: bytes | None = None
    """The whole answer in base64, head included: written as it is, proper HTTP or not."""
    raw_end: RawEnd = "close"
    """After `raw`: close; `keep` the connection for the next request, as if the answer had been a proper one; `hang`
    without a word; `reset`; or `half_close`, its own side alone."""


class StreamOptions(msgspec.Struct):
    """OpenAI's `stream_options`."""

    include_usage: bool | None = None


class Message(msgspec.Struct):
    """One message, as far as it is read."""

    role: str
    content: Any = None

    @property
    def text(self) -> str:
        """Its text, that of its parts joined."""
        if isinstance(self.content, list):
            parts = [part.get("text") for part in self.content if isinstance(part, dict)]
            return "".join(part for part in parts if isinstance(part, str))
        return self.content if isinstance(self.content, str) else ""


class ChatRequest(msgspec.Struct):
    """A chat request, as far as the sandbox reads it."""

    model: str
    messages: list[Message]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    metadata: Any = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream is to end with its usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def is_model_known(self) -> bool:
        """Whether the sandbox claims to have the model."""
        return not self.model.startswith(_UNKNOWN_MODEL)

    @property
    def prompt_tokens(self) -> int:
        """A plausible count: a token for four characters, three for each message's frame."""
        return 3 + sum(3 + (len(message.text) + 3) // 4 for message in self.messages)

    def answer_text(self) -> str:
        """What the rule says: the last `Reply with exactly: …` of the last user message, else a label."""
        said = next((message.text for message in reversed(self.messages) if message.role == "user"), "")
        found = _EXACTLY.findall(said)
        if found:
            return str(found[-1]).strip()
        return f"This is the ibex sandbox, not a model. It read {len(said)} characters."

    def forced_tool(self) -> dict[str, Any] | None:
        """The function that `tool_choice` forces, the first one if any will do; None when none is forced."""
        functions = [tool.get("function") or {} for tool in self.tools or ()]
        if self.tool_choice == "required":
            return functions[0] if functions else None
        if not isinstance(self.tool_choice, dict):
            return None
        wanted = (self.tool_choice.get("function") or {}).get("name")
        return next((function for function in functions if function.get("name") == wanted), None)


_decode_request = msgspec.json.Decoder(ChatRequest).decode
_decode_controls = msgspec.json.Decoder(Controls).decode
_CALM: Final = Controls()


def read_request(body: bytes) -> ChatRequest:
    """Read a body; raises ValueError when it is not a chat request."""
    try:
        return _decode_request(body)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_controls(request: ChatRequest, header: bytes | None) -> Controls:
    """What the request asks of the sandbox; raises ValueError when that cannot be understood."""
    if header is not None:
        return _decode_controls(header)
    found = request.metadata.get("sandbox") if isinstance(request.metadata, dict) else None
    if found is None:
        return _CALM
    return _decode_controls(found if isinstance(found, str) else msgspec.json.encode(found))
