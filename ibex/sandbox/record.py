"""The sandbox's memory of the requests it was sent."""

import time
from collections import deque
from typing import Any, Final

MAX_REQUESTS: Final = 1000
MAX_BYTES: Final = 64 << 20

_MASKED: Final = frozenset({b"authorization", b"api-key", b"x-api-key", b"cookie"})


class Entry:
    """One request, and how it ended: None while it runs, then `complete`, `cut` or `client_disconnect`."""

    __slots__ = ("body", "ended", "ended_at", "fields", "method", "path", "received_at")

    def __init__(self, method: str, path: str, fields: list[tuple[bytes, bytes]], body: bytes) -> None:
        self.method = method
        self.path = path
        self.fields = fields
        self.body = body
        self.received_at = time.time()
        self.ended: str | None = None
        self.ended_at: float | None = None

    def end(self, how: str) -> None:
        """Note the first ending."""
        if self.ended is None:
            self.ended, self.ended_at = how, time.time()

    @property
    def headers(self) -> list[tuple[str, str]]:
        """The header fields as they were written, secrets masked."""
        return [
            (name.decode("latin-1"), "***" if name.lower() in _MASKED else value.decode("latin-1"))
            for name, value in self.fields
        ]

    def show(self) -> dict[str, Any]:
        """The entry as JSON shows it; `body` is the exact text."""
        return {
            "method": self.method,
            "path": self.path,
            "headers": self.headers,
            "body": self.body.decode("utf-8", "replace"),
            "received_at": self.received_at,
            "ended": self.ended,
            "ended_at": self.ended_at,
        }


class RequestLog:
    """The last requests, oldest first, within a number and a size; `total` counts all there ever were."""

    def __init__(self) -> None:
        self._entries: deque[Entry] = deque()
        self._bytes = 0
        self.total = 0

    def add(self, entry: Entry) -> None:
        """Remember a request, and forget the oldest beyond the bounds."""
        self.total += 1
        self._entries.append(entry)
        self._bytes += len(entry.body)
        while len(self._entries) > MAX_REQUESTS or (self._bytes > MAX_BYTES and len(self._entries) > 1):
            self._bytes -= len(self._entries.popleft().body)

    def clear(self) -> None:
        """Forget all requests, and their number."""
        self._entries.clear()
        self._bytes = self.total = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Entry:
        return self._entries[index]

    def last(self, limit: int = MAX_REQUESTS) -> list[Entry]:
        """The latest requests, oldest first."""
        return list(self._entries)[-limit:] if limit > 0 else []
