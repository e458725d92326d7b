"""One answer from bytes: recorded ones at every boundary, forged ones at none."""

import gc
import weakref
from dataclasses import dataclass

import pytest

from ibex.providers.answer_reader import MAX_HEAD_BYTES, AnswerInvalid, AnswerReader

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


@dataclass
class Read:
    """What became of an answer."""

    status: int
    body: bytes
    is_reusable: bool


def read(*pieces: bytes, eof: bool = False) -> Read:
    reader = AnswerReader()
    body = b""
    for piece in pieces:
        if piece:
            reader.feed(piece)
            body += reader.take()
    if eof:
        reader.feed_eof()
    assert reader.is_complete
    return Read(reader.status, body, reader.is_reusable)


def feed_in_pieces(reader: AnswerReader, answer: bytes, size: int) -> None:
    for start in range(0, len(answer), size):
        reader.feed(answer[start : start + size])


WHOLE = {
    "length": (OK + b"Content-Length: 5\r\n\r\nhello", Read(200, b"hello", True)),
    "no body": (OK + b"Content-Length: 0\r\n\r\n", Read(200, b"", True)),
    "chunks": (CHUNKED + b"5\r\nhello\r\n6;ext=1\r\n world\r\n0\r\n\r\n", Read(200, b"hello world", True)),
    "trailers are ignored": (
        CHUNKED + b"5\r\nhello\r\n0\r\nContent-Type: text/html\r\nX-Sum: 1\r\n\r\n",
        Read(200, b"hello", True),
    ),
    "interim answers": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
        + OK
        + b"Content-Length: 2\r\n\r\nhi",
        Read(200, b"hi", True),
    ),
    "connection close": (OK + b"Connection: close\r\nContent-Length: 2\r\n\r\nhi", Read(200, b"hi", False)),
    "close among tokens": (OK + b"Connection: x, Close\r\nContent-Length: 2\r\n\r\nhi", Read(200, b"hi", False)),
    "http/1.0": (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi", Read(200, b"hi", False)),
    "an error": (b"HTTP/1.1 429 Slow\r\nContent-Length: 2\r\n\r\nhi", Read(429, b"hi", True)),
    "no content": (b"HTTP/1.1 204 No Content\r\n\r\n", Read(204, b"", False)),
    "no reason": (b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nhi", Read(200, b"hi", True)),
    "body of line ends": (OK + b"Content-Length: 4\r\n\r\n\r\n\r\n", Read(200, b"\r\n\r\n", True)),
    "upgrade offered": (
        OK + b"Upgrade: h2c\r\nConnection: upgrade\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
        Read(200, b"hi", True),
    ),
}


@pytest.mark.parametrize(("answer", "expected"), WHOLE.values(), ids=WHOLE)
def test_an_answer_is_read_the_same_wherever_it_is_cut(answer: bytes, expected: Read) -> None:
    for cut in range(len(answer) + 1):
        assert read(answer[:cut], answer[cut:]) == expected, cut
    assert read(*(answer[i : i + 1] for i in range(len(answer)))) == expected


def test_the_end_of_the_connection_ends_a_body_that_nothing_else_ends() -> None:
    answer = OK + b"\r\nhello"
    for cut in range(len(answer)):
        assert read(answer[:cut], answer[cut:], eof=True) == Read(200, b"hello", False)


CUT = {
    "nothing": b"",
    "in the head": OK,
    "before the body": OK + b"Content-Length: 5\r\n\r\n",
    "in the body": OK + b"Content-Length: 5\r\n\r\nhell",
    "before a chunk": CHUNKED,
    "in a chunk": CHUNKED + b"5\r\nhel",
    "after a chunk": CHUNKED + b"5\r\nhello\r\n",
    "before the last line end": CHUNKED + b"5\r\nhello\r\n0\r\n",
    "after an interim answer": b"HTTP/1.1 100 Continue\r\n\r\n",
}


@pytest.mark.parametrize("answer", CUT.values(), ids=CUT)
def test_a_short_answer_is_never_a_whole_one(answer: bytes) -> None:
    reader = AnswerReader()
    if answer:
        reader.feed(answer)
    with pytest.raises(AnswerInvalid):
        reader.feed_eof()
    assert not reader.is_complete


EXCESS = {
    "another answer": OK + b"Content-Length: 2\r\n\r\nhi" + OK + b"Content-Length: 0\r\n\r\n",
    "junk": OK + b"Content-Length: 2\r\n\r\nhijunk",
    "a line end": OK + b"Content-Length: 2\r\n\r\nhi\r\n",
    "after no body": OK + b"Content-Length: 0\r\n\r\nx",
    "after no content": b"HTTP/1.1 204 No Content\r\n\r\nx",
    "after chunks": CHUNKED + b"2\r\nhi\r\n0\r\n\r\nx",
    "another answer after chunks": CHUNKED + b"2\r\nhi\r\n0\r\n\r\n" + OK + b"Content-Length: 0\r\n\r\n",
    "a line end after chunks": CHUNKED + b"2\r\nhi\r\n0\r\n\r\n\r\n",
    "half a line end after chunks": CHUNKED + b"2\r\nhi\r\n0\r\n\r\n\r",
    "a line end after trailers": CHUNKED + b"2\r\nhi\r\n0\r\nA: b\r\n\r\n\r\n",
}


@pytest.mark.parametrize("answer", EXCESS.values(), ids=EXCESS)
def test_bytes_after_the_end_poison_the_connection_and_not_the_answer(answer: bytes) -> None:
    for cut in range(len(answer) + 1):
        found = read(answer[:cut], answer[cut:])
        assert found.body in {b"hi", b""}
        assert not found.is_reusable, cut


FORGED = {
    "both framings": OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "both framings, reversed": OK + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "two lengths": OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "two equal lengths": OK + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
    "a list of lengths": OK + b"Content-Length: 5, 5\r\n\r\nhello",
    "negative length": OK + b"Content-Length: -5\r\n\r\nhello",
    "signed length": OK + b"Content-Length: +5\r\n\r\nhello",
    "hex length": OK + b"Content-Length: 0x5\r\n\r\nhello",
    "endless length": OK + b"Content-Length: 99999999999999999999999\r\n\r\nhello",
    "empty length": OK + b"Content-Length: \r\n\r\nhello",
    "length in disguise": OK + b"Content-Length : 5\r\n\r\nhello",
    "folded length": OK + b"Content-Length:\r\n 5\r\n\r\nhello",
    "coded transfer": OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunked not last": OK + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "identity transfer": OK + b"Transfer-Encoding: identity\r\n\r\nhello",
    "two transfer codings": OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "unknown transfer": OK + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked in http/1.0": b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "hex prefix": CHUNKED + b"0x5\r\nhello\r\n0\r\n\r\n",
    "bare lf chunk": CHUNKED + b"5\nhello\n0\n\n",
    "long chunk": CHUNKED + b"2\r\nhello\r\n0\r\n\r\n",
    "endless chunk size": CHUNKED + b"fffffffffffffffff\r\nhello",
    "switching protocols": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    "nine interim answers": b"HTTP/1.1 102 Processing\r\n\r\n" * 9,
    "status below 100": b"HTTP/1.1 099 What\r\nContent-Length: 0\r\n\r\n",
    "http/2": b"HTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n",
    "another protocol": b"SSH-2.0-OpenSSH_9.2\r\n",
    "a line end first": b"\r\n" + OK + b"Content-Length: 0\r\n\r\n",
    "bare lf": OK.replace(b"\r", b"") + b"Content-Length: 0\n\n",
    "nul in a value": OK + b"X: a\0b\r\nContent-Length: 0\r\n\r\n",
    "bare cr in a value": OK + b"X: a\rb\r\nContent-Length: 0\r\n\r\n",
    "folded value": OK + b"X: a\r\n b\r\nContent-Length: 0\r\n\r\n",
    "no name": OK + b": a\r\nContent-Length: 0\r\n\r\n",
    "201 fields": OK + b"A: b\r\n" * 200 + b"\r\n",
    "large head": OK + b"A: " + b"b" * MAX_HEAD_BYTES + b"\r\nContent-Length: 0\r\n\r\n",
    "large heads": (b"HTTP/1.1 102 P\r\nA: " + b"b" * (MAX_HEAD_BYTES // 2) + b"\r\n\r\n") * 3,
    "endless head": OK + b"A: " + b"b" * MAX_HEAD_BYTES,
    "endless trailer": CHUNKED + b"0\r\nA: " + b"b" * 2 * MAX_HEAD_BYTES,
    "endless extension": CHUNKED + b"5;" + b"b" * 2 * MAX_HEAD_BYTES,
}


@pytest.mark.parametrize("answer", FORGED.values(), ids=FORGED)
@pytest.mark.parametrize("size", [1 << 20, 1000, 7])
def test_a_forged_answer_is_refused(answer: bytes, size: int) -> None:
    reader = AnswerReader()
    with pytest.raises(AnswerInvalid):
        feed_in_pieces(reader, answer, size)
    assert not reader.is_complete


def test_only_named_fields_are_seen_and_only_with_fit_values() -> None:
    reader = AnswerReader()
    reader.feed(
        b"HTTP/1.1 200 OK\r\ncontent-TYPE: application/json \r\nX-Request-ID: caf\xe9\r\nOpenAI-Processing-Ms: 12\r\n"
        b"Retry-After: " + b"1" * 257 + b"\r\nSet-Cookie: a=b\r\nServer: x\r\nContent-Length: 0\r\n\r\n"
    )
    assert reader.headers == {"content-type": "application/json", "openai-processing-ms": "12"}


@pytest.mark.parametrize(("coding", "is_coded"), [(b"gzip", True), (b"identity", False), (b"", False), (b"X", True)])
def test_a_coded_body_is_known(coding: bytes, is_coded: bool) -> None:
    reader = AnswerReader()
    reader.feed(OK + b"Content-Encoding: " + coding + b"\r\nContent-Length: 0\r\n\r\n")
    assert reader.is_coded is is_coded


@pytest.mark.parametrize("answer", [OK + b"Content-Length: 2\r\n\r\nhi", CHUNKED + b"2\r\nhi\r\n0\r\n\r\n"])
def test_a_reader_that_is_done_needs_no_garbage_collector(answer: bytes) -> None:
    gc.disable()
    try:
        reader = AnswerReader()
        reader.feed(answer)
        ghost = weakref.ref(reader)
        del reader
        assert ghost() is None
    finally:
        gc.enable()
