"""A head that a connection sends again: the same bytes mean the same, so they are not parsed anew."""

import re
from dataclasses import replace
from typing import Final

from aiohttp import StreamReader
from multidict import CIMultiDict, CIMultiDictProxy

from ibex.server.edge.head import RequestHead

_LENGTH: Final = re.compile(rb"\r\nContent-Length: ?([1-9][0-9]{0,6})\r\n", re.IGNORECASE)
_HEAD_END: Final = b"\r\n\r\n"
_MAX_DIGITS: Final = 7


class WholeBody:
    """A body that came in one piece with its head; read as the parser's own payloads are."""

    __slots__ = ("_data",)

    def __init__(self, data: bytes) -> None:
        self._data = data

    @property
    def size(self) -> int:
        """How long the head says it is, in bytes."""
        return len(self._data)

    def is_eof(self) -> bool:
        """Whether all of it has come."""
        return True

    def read_nowait(self) -> bytes:
        """All of it."""
        return self._data


Payload = StreamReader | WholeBody
"""Where the rest of a request is read from."""


class RepeatedHead:
    """The bytes of one request's head, up to the digits of its length and after them, and what was read of it.

    An OpenAI client sends the same head with every request of a connection, but for the length. The parser has judged
    it the first time; afterwards two comparisons of bytes take its place, and nothing but the digits is read. Whatever
    differs in a single byte goes to the parser.
    """

    __slots__ = ("_after", "_before", "head")

    def __init__(self, before: bytes, after: bytes, head: RequestHead) -> None:
        self._before = before
        self._after = after
        self.head = head

    @classmethod
    def learn(cls, data: bytes, head: RequestHead) -> "RepeatedHead | None":
        """Learn a head from the bytes of a whole request; None for one whose repetition would need the parser."""
        end = data.find(_HEAD_END) + len(_HEAD_END)
        lengths = list(_LENGTH.finditer(data, 0, end))
        is_plain = head.fault is None and not head.is_http10 and not head.ends_connection and head.method == "POST"
        if not is_plain or len(lengths) != 1 or "Expect" in head.headers or not data.startswith(b"POST "):
            return None
        if int(lengths[0][1]) != head.content_length or len(data) != end + head.content_length:
            return None
        headers = CIMultiDict(head.headers)
        del headers["Content-Length"]  # each repetition has its own
        repeated = replace(head, headers=CIMultiDictProxy(headers), content_length=None)
        return cls(data[: lengths[0].start(1)], data[lengths[0].end(1) : end], repeated)

    def find_body(self, data: bytes) -> WholeBody | None:
        """The body of a request that is this head again and its whole body; None for any other bytes."""
        before, after = self._before, self._after
        if not data.startswith(before):
            return None
        start = len(before)
        stop = data.find(b"\r", start, start + _MAX_DIGITS + 1)
        digits = data[start:stop]
        if stop < 0 or not digits.isdigit() or digits[0] == 0x30 or not data.startswith(after, stop):
            return None
        begin = stop + len(after)
        return WholeBody(data[begin:]) if len(data) - begin == int(digits) else None
