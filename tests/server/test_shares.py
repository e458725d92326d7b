"""What workers told each other, as it is kept for their successors."""

from ibex.server.messages import Share
from ibex.server.shares import ShareBook


def test_a_key_has_only_its_latest_payload_and_that_is_the_newest() -> None:
    book = ShareBook()
    for share in (Share(b"a", b"1"), Share(b"b", b"2"), Share(b"a", b"3")):
        book.keep(share)

    assert [(share.key, share.payload) for share in book] == [(b"b", b"2"), (b"a", b"3")]


def test_the_oldest_leave_when_there_are_too_many() -> None:
    book = ShareBook(max_entries=3)
    for number in range(5):
        book.keep(Share(b"%d" % number, b""))

    assert [share.key for share in book] == [b"2", b"3", b"4"]


def test_the_oldest_leave_when_they_weigh_too_much() -> None:
    book = ShareBook(max_bytes=100)
    for number in range(5):
        book.keep(Share(b"%d" % number, b"x" * 39))
    book.keep(Share(b"4", b"x" * 19))

    assert [share.key for share in book] == [b"3", b"4"]
