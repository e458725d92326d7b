"""Waits between retries, and their end."""

from ibex.providers.retries import RetryBudget


def test_waits_grow_and_stop_at_the_number() -> None:
    for _ in range(100):
        budget = RetryBudget(3, 30)
        first, second, third = budget.take(), budget.take(), budget.take()
        assert first is not None
        assert second is not None
        assert third is not None
        assert 0.25 <= first <= 0.5 <= second <= 1 <= third <= 2
        assert budget.take() is None


def test_waits_together_stay_within_the_budget() -> None:
    budget = RetryBudget(10, 5)
    waits = list(iter(budget.take, None))
    assert sum(waits) <= 5
    assert len(waits) < 10


def test_a_provider_is_given_the_time_it_asks_for_or_not_asked_again() -> None:
    budget = RetryBudget(3, 30)
    assert budget.take(20) == 20
    assert budget.take(20) is None
    assert budget.take(10) == 10
    assert RetryBudget(3, 30).take(31) is None
    wait = RetryBudget(3, 30).take(0)
    assert wait is not None
    assert wait >= 0.25


def test_no_retries_are_none() -> None:
    assert RetryBudget(0, 30).take() is None
