"""The sandbox's memory is bounded."""

from ibex.sandbox.record import MAX_BYTES, MAX_REQUESTS, Entry, RequestLog


def test_the_oldest_requests_are_forgotten_beyond_the_bounds() -> None:
    log = RequestLog()
    for number in range(MAX_REQUESTS + 5):
        log.add(Entry("POST", f"/{number}", [], b""))
    assert (len(log), log.total, log[0].path, log[-1].path) == (
        MAX_REQUESTS,
        MAX_REQUESTS + 5,
        "/5",
        f"/{MAX_REQUESTS + 4}",
    )
    body = b"x" * (MAX_BYTES // 2)
    for _ in range(3):
        log.add(Entry("POST", "/large", [], body))
    assert len(log) == 2
    assert [entry.path for entry in log.last(1)] == ["/large"]
    assert log.last(0) == []


def test_the_first_ending_counts() -> None:
    entry = Entry("POST", "/", [(b"Api-Key", b"x"), (b"A", b"b")], b"")
    entry.end("cut")
    entry.end("client_disconnect")
    assert entry.show()["ended"] == "cut"
    assert entry.headers == [("Api-Key", "***"), ("A", "b")]
