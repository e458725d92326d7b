"""The sandbox's answers, in the shapes OpenAI gives them."""

import re
import secrets
import time
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from ibex.sandbox.requests import ChatRequest, Controls

FINGERPRINT: Final = "ibex-sandbox"
MODELS: Final = ("ibex-sandbox", "gpt-4o-mini", "gpt-4o")

_encode = msgspec.json.Encoder().encode
_PIECE: Final = re.compile(r"\S+\s*|\s+")
_PLAUSIBLE: Final = {"string": "sandbox", "number": 1, "integer": 1, "boolean": True, "array": [], "object": {}}
_ERROR_TYPES: Final = {429: "rate_limit_error", 401: "authentication_error", 403: "permission_error"}


class Completion:
    """One answer: its text or tool call, how it is cut into events, its usage."""

    __slots__ = ("_arguments", "_controls", "_created", "_id", "_request", "_text", "_tool")

    def __init__(self, request: ChatRequest, controls: Controls) -> None:
        self._request = request
        self._controls = controls
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._tool = request.forced_tool() if request.tools else None
        self._arguments = _encode(_plausible_arguments(self._tool)).decode() if self._tool is not None else ""
        self._text = controls.text if controls.text is not None else request.answer_text()

    def body(self) -> bytes:
        """The JSON reply."""
        if self._controls.body is not None:
            return self._controls.body.encode()
        choices = [self._choice(index) for index in range(self._request.n or 1)]
        return _encode({**self._frame("chat.completion"), "choices": choices, "usage": self._usage()})

    def events(self) -> list[bytes]:
        """The stream's events, each with its empty line, `[DONE]` the last."""
        end = self._controls.line_end.encode()
        comments = b": sandbox" + end
        events = [comments * self._controls.comments + b"data: " + data + end + end for data in self._data()]
        failing_at = self._controls.error_after
        if failing_at is not None:
            error = {"error": {"message": "The sandbox was told to fail.", "type": "server_error", "code": None}}
            events[failing_at:] = [b"data: " + _encode(error) + end + end]
        elif not self._controls.no_done:
            events.append(b"data: [DONE]" + end + end)
        return events

    def _data(self) -> Iterator[bytes]:
        wants_usage = self._request.wants_usage
        frame = self._frame("chat.completion.chunk")
        nothing: dict[str, Any] = {"usage": None} if wants_usage else {}
        for index in range(self._request.n or 1):
            for delta, reason in self._deltas():
                choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
                yield _encode({**frame, "choices": [choice], **nothing})
        if wants_usage:
            yield _encode({**frame, "choices": [], "usage": self._usage()})

    def _deltas(self) -> Iterator[tuple[dict[str, Any], str | None]]:
        if self._tool is not None:
            yield {"role": "assistant", "content": None, "tool_calls": [{"index": 0, **self._tool_call("")}]}, None
            yield {"tool_calls": [{"index": 0, "function": {"arguments": self._arguments}}]}, None
            yield {}, "tool_calls"
            return
        yield {"role": "assistant", "content": "", "refusal": None}, None
        for piece in self._pieces():
            yield {"content": piece}, None
        yield {}, "stop"

    def _pieces(self) -> list[str]:
        wanted, size = self._controls.events, self._controls.event_bytes
        if wanted is None and size is None:
            return _PIECE.findall(self._text)
        text = self._text or "."
        if size is not None:
            text = (text * (size // len(text) + 1))[:size]
        return [text] * (1 if wanted is None else wanted)

    def _choice(self, index: int) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self._text, "refusal": None, "annotations": []}
        if self._tool is not None:
            message |= {"content": None, "tool_calls": [self._tool_call(self._arguments)]}
        reason = "stop" if self._tool is None else "tool_calls"
        return {"index": index, "message": message, "logprobs": None, "finish_reason": reason}

    def _tool_call(self, arguments: str) -> dict[str, Any]:
        name = self._tool["name"] if self._tool is not None else ""
        return {"id": f"call_{self._id[-16:]}", "type": "function", "function": {"name": name, "arguments": arguments}}

    def _frame(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._request.model,
            "service_tier": "default",
            "system_fingerprint": FINGERPRINT,
        }

    def _usage(self) -> Any:
        if self._controls.usage is not msgspec.UNSET:
            return self._controls.usage
        prompt = self._request.prompt_tokens
        completion = max(1, (len(self._arguments or self._text) + 3) // 4) * (self._request.n or 1)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": prompt // 2 // 128 * 128, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }


def failure(status: int, message: str, *, code: str | None = None, param: str | None = None) -> bytes:
    """An error body as OpenAI writes it."""
    kind = "server_error" if status >= 500 else _ERROR_TYPES.get(status, "invalid_request_error")
    return _encode({"error": {"message": message, "type": kind, "param": param, "code": code}})


def unknown_model(model: str) -> bytes:
    """What OpenAI says of a model it does not have."""
    message = f"The model `{model}` does not exist or you do not have access to it."
    return failure(404, message, code="model_not_found")


def model(name: str) -> dict[str, Any]:
    """A model as `GET /v1/models/{id}` shows it."""
    return {"id": name, "object": "model", "created": 1_700_000_000, "owned_by": FINGERPRINT}


def _plausible_arguments(function: dict[str, Any]) -> dict[str, Any]:
    """A value of the right type for each argument that is required."""
    parameters = function.get("parameters") or {}
    properties = parameters.get("properties") or {}
    return {
        name: (found.get("enum") or [_PLAUSIBLE.get(str(found.get("type")), "sandbox")])[0]
        for name in parameters.get("required") or ()
        if isinstance(found := properties.get(name) or {}, dict)
    }
