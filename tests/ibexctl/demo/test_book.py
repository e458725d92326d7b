"""A client's book against a store, and what becomes of a promise that was broken."""

from uuid import uuid4

from ibexctl.demo.book import compare
from ibexctl.demo.story import Finding, Promise


def test_missing_doubled_and_unseen_turns_are_told_apart() -> None:
    seen = [uuid4() for _ in range(4)]
    kept = compare(seen, [seen[0], seen[1], seen[1], seen[2], uuid4()])
    assert (kept.once, kept.missing, kept.doubled, kept.unseen) == (2, 1, 1, 1)
    assert not kept.is_exact
    assert compare(seen, [*seen, uuid4()]).is_exact


def test_an_unseen_turn_that_is_stored_twice_is_a_fault_too() -> None:
    unseen = uuid4()
    assert not compare([], [unseen, unseen]).is_exact


def test_one_broken_promise_fails_the_demonstration() -> None:
    held, broken = Promise("It holds.", is_kept=True), Promise("It does not.", is_kept=False)
    assert Finding({"turns": 1}, [held]).answer().exit_code == 0
    answer = Finding({"turns": 1}, [held, broken]).answer()
    assert answer.exit_code == 1
    assert answer.data["is_kept"] is False
    assert any(isinstance(view, str) and view.startswith("BROKEN  It does not.") for view in answer.views)
