"""When to ask a provider again: a bounded number of times, with growing, jittered waits out of one budget."""

import random
from typing import Final

_FIRST_WAIT: Final = 0.5
_LONGEST_WAIT: Final = 8.0


class RetryBudget:
    """The retries of one call."""

    __slots__ = ("_left", "_next", "_seconds_left")

    def __init__(self, retries: int, seconds: float) -> None:
        self._left = retries
        self._seconds_left = seconds
        self._next = _FIRST_WAIT

    def take(self, retry_after: float | None = None) -> float | None:
        """Seconds to wait before the next try, at least what the provider asks for; None when there is to be none,
        since the tries are used up or the wait is longer than what is left of the budget.
        """
        if self._left <= 0:
            return None
        wait = self._next * random.uniform(0.5, 1.0)  # noqa: S311 (spreads load; guards nothing)
        self._next = min(2 * self._next, _LONGEST_WAIT)
        if retry_after is not None:
            wait = max(wait, retry_after)
        if wait > self._seconds_left:
            return None
        self._left -= 1
        self._seconds_left -= wait
        return wait
