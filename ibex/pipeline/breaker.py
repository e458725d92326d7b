"""The circuit breaker: when calls to a store keep failing, leave it alone and look at it now and then."""

import time

FAILURES_BEFORE_OPEN = 3
LEAST_PAUSE, LONGEST_PAUSE = 0.1, 1.0
"""Seconds between two probes while open; doubled after each that fails."""


class Breaker:
    """Opens after three failures in a row; while open, lets one call through at a time, to see whether it succeeds."""

    def __init__(self) -> None:
        self.is_open = False
        self._failures = 0
        self._is_probing = False
        self._pause = LEAST_PAUSE
        self._next_probe_at = 0.0

    def admits_call(self) -> bool:
        """Whether to call now. Whoever is told so while the breaker is open is the probe and must report back."""
        if not self.is_open:
            return True
        if self._is_probing or time.monotonic() < self._next_probe_at:
            return False
        self._is_probing = True
        return True

    def record_success(self) -> bool:
        """A call succeeded; True when that closed the breaker."""
        was_open, self.is_open = self.is_open, False
        self._failures, self._is_probing, self._pause = 0, False, LEAST_PAUSE
        return was_open

    def record_failure(self) -> bool:
        """A call failed; True when that opened the breaker."""
        self._failures += 1
        if self.is_open and not self._is_probing:
            return False  # a call from before the breaker opened
        if self.is_open:
            self._pause = min(self._pause * 2, LONGEST_PAUSE)
        elif self._failures < FAILURES_BEFORE_OPEN:
            return False
        was_open, self.is_open = self.is_open, True
        self._is_probing = False
        self._next_probe_at = time.monotonic() + self._pause
        return not was_open
