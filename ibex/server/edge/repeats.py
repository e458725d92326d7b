"""A head that a connection sends again: the same bytes mean the same, so they are not parsed anew."""

import re
from dataclasses import replace
from typing import Final

from aiohttp import StreamReader
from multidict import CIMultiDict, CIMultiDictProxy

from ibex.server.edge.head import RequestHead

_CHANGING: Final = re.compile(
    rb"\r\n(Content-Length|X-IBEX-Session-ID|X-Request-ID|traceparent|Idempotency-Key): ?([!-~]{1,64})(?=\r\n)",
    re.IGNORECASE,
)
_LENGTH: Final = re.compile(rb"[1-9][0-9]{0,6}(?=\r)")
_ID: Final = re.compile(rb"[!-~]{1,64}(?=\r)")
_HEAD_END: Final = b"\r\n\r\n"
_MAX_HEAD_BYTES: Final = 16 << 10


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
    """The bytes of one request's head without a few values, and what was read of it.

    A client sends the same head with every request of a connection, but for the body's length and the request's ids.
    The parser has judged it the first time; afterwards comparisons of bytes take its place, and only those values are
    read: the length's digits, and ids of characters that no parser reads in two ways. Whatever else differs in a single
    byte goes to the parser.
    """

    __slots__ = ("_head", "_last", "_names", "_pieces")

    def __init__(self, pieces: list[bytes], names: list[str], last: bytes, head: RequestHead) -> None:
        self._pieces = pieces
        """The bytes before each value, from the one before it."""
        self._names = names
        """Whose values they are; the length's is empty."""
        self._last = last
        self._head = head

    @classmethod
    def learn(cls, data: bytes, head: RequestHead) -> "RepeatedHead | None":
        """Learn a head from the bytes of a whole request; None for one whose repetition would need the parser."""
        end = data.find(_HEAD_END) + len(_HEAD_END)
        is_plain = head.fault is None and not head.is_http10 and not head.ends_connection and head.method == "POST"
        if not is_plain or end > _MAX_HEAD_BYTES or "Expect" in head.headers or not data.startswith(b"POST "):
            return None
        pieces, names, position = [], [], 0
        headers = CIMultiDict(head.headers)
        for found in _CHANGING.finditer(data, 0, end):
            name = found[1].decode()
            if len(headers.popall(name)) > 1:
                return None
            pieces.append(data[position : found.start(2)])
            names.append("" if name.lower() == "content-length" else name)
            position = found.end(2)
        if names.count("") != 1 or not head.content_length or len(data) != end + head.content_length:
            return None
        repeated = replace(head, headers=CIMultiDictProxy(headers), content_length=None)
        return cls(pieces, names, data[position:end], repeated)

    def find(self, data: bytes) -> tuple[RequestHead, WholeBody] | None:
        """A request that is this head again and its whole body; None for any other bytes."""
        position = length = 0
        values: list[tuple[str, str]] = []
        for piece, name in zip(self._pieces, self._names, strict=True):
            start = position + len(piece)
            if not data.startswith(piece, position):
                return None
            found = (_ID if name else _LENGTH).match(data, start)
            if found is None:
                return None
            position = found.end()
            if name:
                values.append((name, found[0].decode()))
            else:
                length = int(found[0])
        begin = position + len(self._last)
        if not data.startswith(self._last, position) or len(data) - begin != length:
            return None
        return self._with(values), WholeBody(data[begin:])

    def _with(self, values: list[tuple[str, str]]) -> RequestHead:
        if not values:
            return self._head
        headers = CIMultiDict(self._head.headers)
        headers.extend(values)
        return replace(self._head, headers=CIMultiDictProxy(headers))
