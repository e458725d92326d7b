"""What a directive is: the operator's instruction, woven into each request of an agent, and its three modes."""

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from hashlib import sha256

import msgspec

MAX_DIRECTIVE_BYTES = 32_768


class DirectiveMode(StrEnum):
    """Where in the messages a directive is woven."""

    SYSTEM_FIRST = "system_first"
    """A new system message at index 0; the client's own system messages follow untouched."""
    SYSTEM_APPEND = "system_append"
    """A new system message after the leading run of system messages."""
    USER_PREPEND = "user_prepend"
    """`[DIRECTIVE]: <text>`, a blank line, then the first user message's own text."""


@dataclass(frozen=True)
class Directive:
    """One immutable version of an agent's directive. The text never appears in a log, a trace or a metric."""

    version: int
    mode: DirectiveMode
    text: str

    def __repr__(self) -> str:
        return f"Directive(version={self.version}, mode={self.mode})"

    @cached_property
    def system_message(self) -> bytes:
        """The text as a system message, in JSON: made once, spliced into every request."""
        return msgspec.json.encode({"role": "system", "content": self.text})

    @cached_property
    def prefix(self) -> bytes:
        """What `user_prepend` puts before a user's text, as the inside of a JSON string."""
        return msgspec.json.encode(f"[DIRECTIVE]: {self.text}\n\n")[1:-1]

    @property
    def sha256(self) -> bytes:
        """The digest of the text's UTF-8 (32 bytes)."""
        return sha256(self.text.encode()).digest()


def check_directive_text(text: str) -> str | None:
    """Why a text cannot be a directive, as a sentence; None when it can."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return "The directive is not valid UTF-8."
    if not text.strip():
        return "The directive is empty."
    if size > MAX_DIRECTIVE_BYTES:
        return f"The directive is {size:,} bytes; at most {MAX_DIRECTIVE_BYTES:,} are allowed."
    return "The directive holds a NUL character." if "\0" in text else None
