"""Reads one HTTP/1.1 answer from bytes, in whatever pieces they come, without I/O and without trusting the sender."""

import re
from enum import Enum
from typing import Final

import httptools

from ibex.errors import ProviderUnavailable

MAX_HEAD_BYTES: Final = 64 << 10
MAX_FIELDS: Final = 200
MAX_INTERIM_ANSWERS: Final = 8

_HEAD_END: Final = b"\r\n\r\n"
_ALLOWED_VALUE: Final = re.compile(r"[!-~ ]{1,256}")
_ALLOWED: Final = {
    b"content-type": "content-type",
    b"openai-processing-ms": "openai-processing-ms",
    b"x-request-id": "x-request-id",
    b"retry-after": "retry-after",
}
_FRAMING: Final = frozenset({b"content-length", b"transfer-encoding", b"connection", b"content-encoding"})


class AnswerInvalid(ProviderUnavailable):
    """The model provider's answer was not proper HTTP."""


class Framing(Enum):
    """What tells where a body ends."""

    NONE = "none"
    LENGTH = "length"
    CHUNKED = "chunked"
    CLOSE = "close"


class AnswerReader:
    """One answer while it is being read: `feed` bytes as they come, take `chunks` whenever there are any.

    The head goes through httptools, whose grammar is strict; where a body ends is decided here, from the fields, since
    that is what an attack on framing aims at. Once `is_complete`, the body is whole; once not `is_reusable`, nothing
    more may be asked over the same connection.
    """

    __slots__ = (
        "__weakref__",
        "_fields",
        "_framing",
        "_head",
        "_head_bytes",
        "_is_begun",
        "_left",
        "_parser",
        "_since_body",
        "_tail",
        "chunks",
        "content_length",
        "has_bytes",
        "headers",
        "interim_answers",
        "is_coded",
        "is_complete",
        "is_reusable",
        "size",
        "status",
    )

    def __init__(self) -> None:
        self.status = 0
        """The final answer's status; 0 until its head is whole."""
        self.headers: dict[str, str] = {}
        """The fields that may be looked at, lower-case; a value that is not `[!-~ ]{1,256}` is left out."""
        self.content_length: int | None = None
        self.is_coded = False
        """Whether the body has a Content-Encoding, which nobody asked for."""
        self.chunks: list[bytes] = []
        """Body bytes that have come and were not taken."""
        self.size = 0
        """How many bytes `chunks` holds; whoever takes them sets it back."""
        self.has_bytes = False
        self.is_complete = False
        self.is_reusable = True
        self.interim_answers = 0
        self._fields: list[tuple[bytes, bytes]] = []
        self._framing = Framing.NONE
        self._head = b""
        self._head_bytes = 0
        self._is_begun = False
        self._left = 0
        self._since_body = 0
        self._tail = b""
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        """Take bytes from the socket; raises AnswerInvalid, after which the reader must not be fed again."""
        self.has_bytes = True
        if not self.status:
            data = self._feed_head(data)
            if not self.status or not (data or self.is_complete):
                return
        if self.is_complete:
            self.is_reusable = self.is_reusable and not data
        elif self._framing is Framing.LENGTH:
            left = self._left - len(data)
            if left < 0:
                data = data[:left]
                self.is_reusable = False
            self._left = left
            self._push(data)
            self.is_complete = left <= 0
        elif self._framing is Framing.CHUNKED:
            self._feed_chunked(data)
        else:
            self._push(data)

    def feed_eof(self) -> None:
        """The sender has ended cleanly: the end of a body that nothing else delimits, else raises AnswerInvalid."""
        self.is_reusable = False
        if self.is_complete:
            return
        if self._framing is not Framing.CLOSE:
            raise AnswerInvalid("The model provider closed the connection before its answer was whole.")
        self.is_complete = True

    def take(self) -> bytes:
        """All body bytes that have come since the last call."""
        chunks = self.chunks
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        chunks.clear()
        self.size = 0
        return data

    def _feed_head(self, data: bytes) -> bytes:
        """Read heads until the final one is whole; the bytes after it. What is not whole is kept."""
        searched = max(0, len(self._head) - 3)
        if self._head:
            data = self._head + data
        while True:
            if not data.startswith(b"HTTP/1."[: len(data)]):
                raise AnswerInvalid
            end = data.find(_HEAD_END, searched) + 4
            if self._head_bytes + (end if end > 3 else len(data)) > MAX_HEAD_BYTES:
                raise AnswerInvalid("The model provider's answer has too large a head.")
            if end <= 3:
                if b"\n\n" in data:
                    raise AnswerInvalid
                self._head = data
                return b""
            self._head_bytes += end
            self._parse(data[:end])
            data, searched = data[end:], 0
            if self.status or not data:
                self._head = b""
                if self.status and self._framing is not Framing.CHUNKED:
                    self._drop_parser()
                return data

    def _feed_chunked(self, data: bytes) -> None:
        self._since_body += len(data)
        try:
            self._parse(data)
        except AnswerInvalid:
            if not self.is_complete:
                raise
            self.is_reusable = False
        if self._since_body > MAX_HEAD_BYTES:
            raise AnswerInvalid("The model provider's answer has too much between its chunks.")
        self._tail = tail = (self._tail + data)[-6:]
        if self.is_complete:
            # The parser skips line ends between two messages in silence; after the end they are bytes like any others.
            if not tail.endswith(_HEAD_END) or tail == b"\r\n\r\n\r\n":
                self.is_reusable = False
            self._drop_parser()

    def _drop_parser(self) -> None:
        """The parser refers back to this reader; without this only the garbage collector would end the two."""
        del self._parser

    def _parse(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:
            if isinstance(error.__context__, AnswerInvalid):
                raise error.__context__ from None
            raise AnswerInvalid from None
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            raise AnswerInvalid from None

    def _push(self, data: bytes) -> None:
        self.chunks.append(data)
        self.size += len(data)

    # What httptools calls.

    def on_message_begin(self) -> None:
        if self._is_begun:
            raise AnswerInvalid
        self._is_begun = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.status:  # else it is a trailer, which is ignored
            self._fields.append((name, value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if len(self._fields) > MAX_FIELDS:
            raise AnswerInvalid("The model provider's answer has too many header fields.")
        if status >= 200:
            self._read_fields(status)
            return
        self.interim_answers += 1
        if status < 100 or status == 101 or self.interim_answers > MAX_INTERIM_ANSWERS:
            raise AnswerInvalid
        self._is_begun = False
        self._fields.clear()

    def on_body(self, body: bytes) -> None:
        self._since_body = 0
        self.chunks.append(body)
        self.size += len(body)

    def on_message_complete(self) -> None:
        if self._framing is Framing.CHUNKED:
            self.is_complete = True

    def _read_fields(self, status: int) -> None:
        lengths: list[bytes] = []
        codings: list[bytes] = []
        connection = b""
        for raw_name, raw_value in self._fields:
            name = raw_name.lower()
            if name in _ALLOWED:
                value = raw_value.strip(b" \t").decode("latin-1")
                if _ALLOWED_VALUE.fullmatch(value):
                    self.headers.setdefault(_ALLOWED[name], value)
            elif name in _FRAMING:
                value_bytes = raw_value.strip(b" \t").lower()
                if name == b"content-length":
                    lengths.append(value_bytes)
                elif name == b"transfer-encoding":
                    codings.append(value_bytes)
                elif name == b"connection":
                    connection += b"," + value_bytes
                elif value_bytes not in {b"", b"identity"}:
                    self.is_coded = True
        self._fields.clear()
        version = self._parser.get_http_version()
        self.is_reusable = version == "1.1" and b"close" not in connection
        self._set_framing(status, lengths, codings, version)
        self.status = status

    def _set_framing(self, status: int, lengths: list[bytes], codings: list[bytes], version: str) -> None:
        if len(lengths) + len(codings) > 1 or version not in {"1.0", "1.1"}:
            raise AnswerInvalid("The model provider's answer has no one length.")
        if codings:
            if codings != [b"chunked"] or version != "1.1":
                raise AnswerInvalid("The model provider's answer has an unknown transfer coding.")
            self._framing = Framing.CHUNKED
        elif lengths:
            if not lengths[0].isdigit():
                raise AnswerInvalid("The model provider's answer has no one length.")
            self._framing = Framing.LENGTH
            self.content_length = self._left = int(lengths[0])
            self.is_complete = self._left == 0
        else:
            self._framing = Framing.CLOSE
            self.is_reusable = False
        if status in {204, 304}:
            self._framing = Framing.NONE
            self.is_complete = True
