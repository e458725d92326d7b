"""A model call as OpenTelemetry's GenAI conventions describe it: all of their names stand here, since they still move.

They are those of `semantic-conventions-genai` (November 2026), still in development, span `gen_ai.client.inference`.
"""

import re

from ibex.domain.completions import ReplyFacts
from ibex.domain.turns import Outcome, Turn

Attributes = dict[str, str | int | float | bool | tuple[str, ...]]

MAX_NAME = 64
"""Characters of a model in a span's name."""

_ODD = re.compile(r"[^A-Za-z0-9._:/@+-]")
_UNPRINTABLE = re.compile(r"[^\x20-\x7e]")


def name_call(turn: Turn) -> str:
    """The span's name. A model is the client's text: in a name it is short, and of letters that no display minds."""
    return f"chat {_ODD.sub('_', turn.model[:MAX_NAME])}"


def describe_call(turn: Turn, reply: ReplyFacts | None) -> Attributes:
    """What the span of a model call says: who was asked for what, and what it cost; never what was said."""
    attributes: Attributes = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": turn.provider,
        "gen_ai.request.model": _plain(turn.model),
        "gen_ai.request.stream": turn.is_streaming,
        "gen_ai.conversation.id": turn.external_id,
    }
    counts = {
        "gen_ai.usage.input_tokens": turn.input_tokens,
        "gen_ai.usage.output_tokens": turn.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": turn.cached_tokens,
    }
    attributes |= {name: count for name, count in counts.items() if count is not None}
    if turn.is_streaming and turn.provider_ttfb_ms is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = turn.provider_ttfb_ms / 1e3
    if reply is not None:
        texts = {"gen_ai.response.id": reply.completion_id, "gen_ai.response.model": reply.model}
        attributes |= {name: _plain(text) for name, text in texts.items() if text is not None}
        if reply.finish_reasons:
            attributes["gen_ai.response.finish_reasons"] = tuple(map(_plain, reply.finish_reasons))
    if (error := find_error(turn)) is not None:
        attributes["error.type"] = error
    return attributes


def find_error(turn: Turn) -> str | None:
    """What the call failed with: the code of the error, from the contract's closed set; None for one that did not."""
    if turn.outcome in {Outcome.PROVIDER_ERROR, Outcome.INCOMPLETE}:
        return turn.error_code or str(turn.outcome)
    return None


def _plain(text: str) -> str:
    return _UNPRINTABLE.sub("?", text[:256])
