"""Cuts a stream of server-sent events into whole events, their bytes verbatim, the moment they are whole."""

import re
from typing import Final

from ibex.errors import ProviderUnavailable

MAX_EVENT_BYTES: Final = 16 << 20

_EVENT_END: Final = re.compile(rb"\n(?:\n|\r\n|\r(?=[^\n]))|\r\r")
"""A line end and an empty line after it. CR CR ends at once, so that a stream of bare CRs is never held back; LF CR may
still become LF CRLF and waits for one more byte."""
_LINE_END: Final = re.compile(rb"\r\n|\n|\r")
_BOM: Final = b"\xef\xbb\xbf"
_LF: Final = 10
_CR: Final = 13


class EventTooLarge(ProviderUnavailable):
    """The model provider sent a stream event larger than ibex takes."""


class EventSplitter:
    """Feed it bytes as they come and get whole events back; an event ends with an empty line (LF, CRLF, CR, mixed).

    Joined, the events and `rest` are byte for byte what was fed, and the events are the same however it was cut. An
    empty line outside an event is an event of its own without data, so that a keep-alive is never held back. The cost
    is proportional to the bytes, even when they trickle one by one.
    """

    __slots__ = ("_buffer", "_ends_in_cr", "_limit", "_searched")

    def __init__(self, limit: int = MAX_EVENT_BYTES) -> None:
        self._buffer = bytearray()
        self._searched = 0
        self._ends_in_cr = False
        self._limit = limit

    @property
    def rest(self) -> bytes:
        """The bytes of an event that is not whole yet."""
        return bytes(self._buffer)

    def feed(self, data: bytes) -> list[bytes]:
        """The events that these bytes make whole; raises EventTooLarge when one grows beyond the limit."""
        buffer = self._buffer
        if buffer:
            buffer += data
            if buffer[0] not in b"\r\n" and not _EVENT_END.search(buffer, max(0, self._searched)):
                return self._keep_waiting()
            data = bytes(buffer)
        elif self._is_one_plain_event(data):
            self._ends_in_cr = False
            return [data]
        events, start = self._split(data)
        self._buffer = bytearray(data[start:] if start else data)
        self._searched = 0
        return events or self._keep_waiting()

    def finish(self) -> list[bytes]:
        """The stream has ended: an event held back for the LF of a possible CRLF is whole after all."""
        self._keep_waiting()
        if not (self._buffer == b"\r" or self._buffer.endswith(b"\n\r")):
            return []
        event = bytes(self._buffer)
        self._buffer = bytearray()
        return [event]

    def _is_one_plain_event(self, data: bytes) -> bool:
        """Whether these are one event and no more, without a CR: what most providers write at a time."""
        return (
            data.endswith(b"\n\n")
            and data.find(b"\n\n") == len(data) - 2
            and data[0] != _LF
            and b"\r" not in data
            and len(data) <= self._limit
        )

    def _keep_waiting(self) -> list[bytes]:
        """Nothing is whole; what comes before an event that is too large has been handed out by now."""
        if len(self._buffer) > self._limit:
            raise EventTooLarge
        self._searched = len(self._buffer) - 2
        return []

    def _split(self, data: bytes) -> tuple[list[bytes], int]:
        events: list[bytes] = []
        start, size = 0, len(data)
        while start < size:
            end = self._find_end(data, start)
            if end < 0:
                break
            if end - start > self._limit:
                break
            events.append(data[start:end])
            self._ends_in_cr = data[end - 1] == _CR
            start = end
        return events, start

    def _find_end(self, data: bytes, start: int) -> int:
        """Where the event that starts here ends; -1 when it is not whole."""
        first = data[start]
        if first == _LF:
            return start + 1
        if first == _CR:
            if self._ends_in_cr or (start + 1 < len(data) and data[start + 1] != _LF):
                return start + 1
            return start + 2 if start + 1 < len(data) else -1
        found = _EVENT_END.search(data, start)
        return found.end() if found else -1


def event_data(event: bytes) -> bytes | None:
    """The event's data, its lines joined by LF; None when it has none (a comment, an empty line, another field)."""
    if (
        event.startswith(b"data: ")
        and event.endswith(b"\n\n")
        and event.find(b"\n") == len(event) - 2
        and b"\r" not in event
    ):
        return event[6:-2]
    values = []
    for line in _LINE_END.split(event.removeprefix(_BOM)):
        name, _, value = line.partition(b":")
        if name == b"data":
            values.append(value.removeprefix(b" "))
    return b"\n".join(values) if values else None
