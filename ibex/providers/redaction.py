"""Makes a stranger's text fit for a client: no controls, no provider key, no directive, at most 1 KiB."""

import json
from collections.abc import Iterable
from typing import Final

MAX_TEXT_BYTES: Final = 1024

_REDACTED: Final = "[redacted]"
_SHORTEST_LINE: Final = 12
"""A directive's lines are looked for one by one too; shorter ones are everyday words."""


def sanitise(text: str, forbidden: Iterable[str] = ()) -> str:
    """The text without what a client must not see, in the order that leaves no way round: controls first (they could
    split a secret), then the forbidden texts, however a server may have quoted them, then the cut.
    """
    text = _strip_controls(text[: 64 * MAX_TEXT_BYTES])
    for spelling in _spellings(forbidden):
        text = text.replace(spelling, _REDACTED)
    encoded = text.encode("utf-8", "replace")
    return text if len(encoded) <= MAX_TEXT_BYTES else encoded[:MAX_TEXT_BYTES].decode("utf-8", "ignore")


def _strip_controls(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


def _spellings(forbidden: Iterable[str]) -> list[str]:
    """Each text as it is, as JSON and Python quote it, and its longer lines; longest first."""
    spellings = set()
    for text in filter(None, forbidden):
        lines = [line.strip() for line in text.splitlines()]
        for part in (text, text.strip(), *(line for line in lines if len(line) >= _SHORTEST_LINE)):
            quoted = (json.dumps(part)[1:-1], json.dumps(part, ensure_ascii=False)[1:-1], repr(part)[1:-1])
            spellings |= {_strip_controls(spelling) for spelling in (part, *quoted)}
    return sorted((spelling for spelling in spellings if spelling.strip()), key=len, reverse=True)
