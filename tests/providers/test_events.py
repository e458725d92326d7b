"""Whole events, whatever the line ends and however the bytes come."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ibex.providers.events import EventSplitter, EventTooLarge, event_data

STREAMS = {
    "lf": (b"data: a\n\ndata: b\n\ndata: [DONE]\n\n", [b"data: a\n\n", b"data: b\n\n", b"data: [DONE]\n\n"]),
    "crlf": (b"data: a\r\n\r\ndata: b\r\n\r\n", [b"data: a\r\n\r\n", b"data: b\r\n\r\n"]),
    "cr": (b"data: a\r\rdata: b\r\r", [b"data: a\r\r", b"data: b\r\r"]),
    "lf, then crlf": (b"data: a\n\r\ndata: b\r\n\n", [b"data: a\n\r\n", b"data: b\r\n\n"]),
    "lf, then cr": (b"data: a\n\rdata: b\n\r", [b"data: a\n\r", b"data: b\n\r"]),
    "many lines": (
        b"event: x\ndata: a\r\ndata: b\rid: 1\n\nd: 2\n\n",
        [b"event: x\ndata: a\r\ndata: b\rid: 1\n\n", b"d: 2\n\n"],
    ),
    "byte order mark": (b"\xef\xbb\xbfdata: a\n\n", [b"\xef\xbb\xbfdata: a\n\n"]),
    "comments": (b": hi\n\ndata: a\n\n", [b": hi\n\n", b"data: a\n\n"]),
    "empty lines between": (b"data: a\n\n\n\r\ndata: b\n\n", [b"data: a\n\n", b"\n", b"\r\n", b"data: b\n\n"]),
    "unfinished": (b"data: a\n\ndata: b\n", [b"data: a\n\n"]),
    "nothing": (b"", []),
}


@pytest.mark.parametrize(("stream", "events"), STREAMS.values(), ids=STREAMS)
def test_events_are_the_same_wherever_the_stream_is_cut(stream: bytes, events: list[bytes]) -> None:
    for first in range(len(stream) + 1):
        for second in range(first, len(stream) + 1):
            splitter = EventSplitter()
            found = [
                *splitter.feed(stream[:first]),
                *splitter.feed(stream[first:second]),
                *splitter.feed(stream[second:]),
            ]
            found += splitter.finish()
            assert found == events
            assert b"".join(found) + splitter.rest == stream


pieces = st.lists(
    st.sampled_from([b"\n", b"\r", b"\r\n", b"data: x", b"data:", b":", b"\xef\xbb\xbf", b"y"]) | st.binary(max_size=3),
    max_size=30,
)


@given(pieces=pieces, data=st.data())
def test_no_byte_is_lost_and_no_cut_is_seen(pieces: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(pieces)
    whole = EventSplitter()
    expected = whole.feed(stream) + whole.finish()
    assert b"".join(expected) + whole.rest == stream
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    splitter, found = EventSplitter(), []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += splitter.feed(stream[start:end])
    assert found + splitter.finish() == expected
    assert splitter.rest == whole.rest


@given(
    lines=st.lists(st.sampled_from([b"data: a", b"id: 1", b": c"]), min_size=1, max_size=3),
    end=st.sampled_from([b"\n", b"\r"]),
)
def test_an_event_is_handed_out_with_its_last_byte(lines: list[bytes], end: bytes) -> None:
    event = b"".join(line + end for line in lines) + end
    splitter = EventSplitter()
    for position in range(len(event) - 1):
        assert splitter.feed(event[position : position + 1]) == []
    assert splitter.feed(event[-1:]) == [event]


def test_crlf_waits_only_for_its_lf() -> None:
    splitter = EventSplitter()
    assert splitter.feed(b"data: a\r\n\r") == []
    assert splitter.feed(b"\n") == [b"data: a\r\n\r\n"]


def test_an_event_that_ends_in_cr_is_whole_when_something_else_follows_or_nothing_does() -> None:
    splitter = EventSplitter()
    assert splitter.feed(b"data: a\n\r") == []
    assert splitter.feed(b"d") == [b"data: a\n\r"]
    assert splitter.feed(b"ata: b\n\r") == []
    assert splitter.finish() == [b"data: b\n\r"]
    assert splitter.rest == b""


def test_trickled_bytes_cost_no_more_than_their_number() -> None:
    splitter = EventSplitter()
    size = 300_000
    for _ in range(size):  # quadratic copying would take minutes, and the test's timeout would tell
        assert splitter.feed(b"x") == []
    assert splitter.feed(b"\n\n") == [b"x" * size + b"\n\n"]


def test_an_event_beyond_the_limit_is_refused_after_those_before_it() -> None:
    splitter = EventSplitter(limit=100)
    assert splitter.feed(b"data: a\n\n" + b"x" * 200) == [b"data: a\n\n"]
    with pytest.raises(EventTooLarge):
        splitter.feed(b"x")
    whole = EventSplitter(limit=100)
    assert whole.feed(b"data: a\n\n" + b"x" * 200 + b"\n\n") == [b"data: a\n\n"]
    with pytest.raises(EventTooLarge):
        whole.finish()


@pytest.mark.parametrize(
    ("event", "data"),
    [
        (b"data: {}\n\n", b"{}"),
        (b"data:{}\n\n", b"{}"),
        (b"data:  {}\n\n", b" {}"),
        (b"data: {}\r\n\r\n", b"{}"),
        (b"data: {}\r\r", b"{}"),
        (b"data: a\ndata: b\n\n", b"a\nb"),
        (b"data: a\rdata: b\n\n", b"a\nb"),
        (b"event: x\ndata: a\nid: 1\n\n", b"a"),
        (b"\xef\xbb\xbfdata: a\n\n", b"a"),
        (b"data\n\n", b""),
        (b"data: \n\n", b""),
        (b"data: data: x\n\n", b"data: x"),
        (b": data: a\n\n", None),
        (b"database: a\n\n", None),
        (b"\n", None),
        (b"\r\n", None),
    ],
)
def test_data_is_read_as_a_browser_reads_it(event: bytes, data: bytes | None) -> None:
    assert event_data(event) == data
