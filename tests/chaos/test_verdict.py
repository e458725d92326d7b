"""The judge of the other tests is one that can say no: each way to cook the books is noticed."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest

from tests.chaos.load import End, Kind, Sight
from tests.chaos.verdict import Books, find_faults

SESSION = "s"
ENDS = {
    End.WHOLE: ("ok", True, ""),
    End.CUT: ("incomplete", True, "PROVIDER_UNAVAILABLE"),
    End.LEFT: ("client_disconnect", True, ""),
    End.REFUSED: ("provider_error", False, "422 INVALID_REQUEST"),
}
Story = tuple[list[Sight], Books]


def tell() -> Story:
    """Two turns of each ending, as they should be recorded."""
    session_id = uuid4()
    sights: list[Sight] = []
    checkpoints: list[dict[str, Any]] = []
    traces: list[dict[str, Any]] = []
    for end, (outcome, has_checkpoint, why) in list(ENDS.items()) * 2:
        is_whole = end is End.WHOLE
        kind = Kind.HANG_UP_LATE if end is End.LEFT else Kind.STREAM
        sight = Sight(kind, SESSION, end=end, turn_id=uuid4(), usage=(20, 3) if is_whole else None, why=why)
        tokens = (20, 3, 0, 23) if is_whole else (None,) * 4
        shared = {
            "turn_id": sight.turn_id, "request_id": sight.request_id, "model": "gpt-4o-mini",
            **dict(zip(("input_tokens", "output_tokens", "cached_tokens", "total_tokens"), tokens, strict=True)),
            "usage_source": "provider" if is_whole else "none",
        }  # fmt: skip
        sights.append(sight)
        traces.append({**shared, "outcome": outcome, "session_id": SESSION})
        if has_checkpoint:
            of_session = {"session_id": session_id, "turn_index": len(checkpoints)}
            checkpoints.append({**shared, **of_session, "status": outcome, "is_complete": is_whole})
    session = {"session_id": session_id, "external_id": SESSION, "turn_count": len(checkpoints)}
    return sights, Books(checkpoints, [session], traces)


def of_outcome(rows: list[Any], outcome: str, name: str = "outcome") -> dict[str, Any]:
    row: dict[str, Any] = next(row for row in rows if row[name] == outcome)
    return row


def test_books_that_are_right_have_no_fault() -> None:
    assert find_faults(*tell()) == []


def lose_checkpoint(_: list[Sight], books: Books) -> None:
    books.checkpoints.pop()
    books.sessions[0]["turn_count"] -= 1


def lose_trace_of_a_refusal(_: list[Sight], books: Books) -> None:
    books.traces.remove(of_outcome(books.traces, "provider_error"))


def lose_turn_everywhere(_: list[Sight], books: Books) -> None:
    lost = books.checkpoints.pop(0)
    books.traces.remove(of_outcome(books.traces, lost["turn_id"], "turn_id"))


def double_checkpoint(_: list[Sight], books: Books) -> None:
    books.checkpoints.append({**books.checkpoints[0], "turn_index": len(books.checkpoints)})


def double_trace(_: list[Sight], books: Books) -> None:
    books.traces.append(dict(books.traces[0]))


def double_under_another_id(_: list[Sight], books: Books) -> None:
    books.traces.append({**of_outcome(books.traces, "provider_error"), "turn_id": uuid4()})


def leave_gap(_: list[Sight], books: Books) -> None:
    books.checkpoints[-1]["turn_index"] += 1


def give_index_twice(_: list[Sight], books: Books) -> None:
    books.checkpoints[-1]["turn_index"] -= 1


def miscount_session(_: list[Sight], books: Books) -> None:
    books.sessions[0]["turn_count"] += 1


def change_usage_of_checkpoint(_: list[Sight], books: Books) -> None:
    books.checkpoints[0]["output_tokens"] += 1


def change_usage_everywhere(_: list[Sight], books: Books) -> None:
    books.checkpoints[0]["output_tokens"] += 1
    books.traces[0]["output_tokens"] += 1


def forget_usage_everywhere(sights: list[Sight], books: Books) -> None:
    sights[0].usage = None
    for row in (books.checkpoints[0], books.traces[0]):
        row |= {"output_tokens": None, "usage_source": "none"}


def call_a_cut_whole(_: list[Sight], books: Books) -> None:
    of_outcome(books.traces, "incomplete")["outcome"] = "ok"
    of_outcome(books.checkpoints, "incomplete", "status").update(status="ok", is_complete=True)


def keep_checkpoint_of_a_refusal(_: list[Sight], books: Books) -> None:
    refused = of_outcome(books.traces, "provider_error")
    row = {**books.checkpoints[0], **refused, "session_id": books.checkpoints[0]["session_id"]}
    books.checkpoints.append({**row, "status": "provider_error", "turn_index": len(books.checkpoints)})


def record_what_ibex_refused(sights: list[Sight], _: Books) -> None:
    next(sight for sight in sights if sight.end is End.REFUSED).why = "503 SERVICE_DEGRADED"


def record_what_nobody_asked(_: list[Sight], books: Books) -> None:
    books.traces.append({**of_outcome(books.traces, "provider_error"), "turn_id": uuid4(), "request_id": uuid4()})


def put_in_another_session(_: list[Sight], books: Books) -> None:
    books.traces[0]["session_id"] = "t"


def put_aside(_: list[Sight], books: Books) -> None:
    books.put_aside.append("1 dead letter of postgres")


@pytest.mark.parametrize(
    "cook",
    [
        lose_checkpoint, lose_trace_of_a_refusal, lose_turn_everywhere, double_checkpoint, double_trace,
        double_under_another_id, leave_gap, give_index_twice, miscount_session, change_usage_of_checkpoint,
        change_usage_everywhere, forget_usage_everywhere, call_a_cut_whole, keep_checkpoint_of_a_refusal,
        record_what_ibex_refused, record_what_nobody_asked, put_in_another_session, put_aside,
    ],
)  # fmt: skip
def test_books_that_were_cooked_are_noticed(cook: Callable[[list[Sight], Books], None]) -> None:
    sights, books = tell()
    cook(sights, books)
    assert find_faults(sights, books) != []


def test_a_request_that_broke_may_or_may_not_have_a_turn() -> None:
    sights, books = tell()
    assert find_faults([replace(sight, end=End.BROKEN) for sight in sights], books) == []
    assert find_faults([*sights, Sight(Kind.JSON, SESSION)], books) == []


@pytest.mark.parametrize(("outcome", "is_right"), [("incomplete", True), ("provider_error", False)])
def test_a_provider_may_fail_before_it_is_seen_that_the_client_has_left(outcome: str, is_right: bool) -> None:
    sights, books = tell()
    of_outcome(books.traces, "client_disconnect")["outcome"] = outcome
    of_outcome(books.checkpoints, "client_disconnect", "status")["status"] = outcome
    assert (find_faults(sights, books) == []) is is_right


def test_turns_that_nobody_noted_are_counted() -> None:
    sights, books = tell()
    assert find_faults(sights[1:], books, unnoted=1) == []
    assert find_faults(sights[1:], books) != []
