"""The rate limit of one process by itself, for as long as Redis is away."""

import time
from collections import deque
from collections.abc import Hashable, Sequence

from ibex.stores.redis.rate_limits import ScopeState, Taken

WINDOW_SECONDS = 60.0
MANY_SCOPES = 10_000
"""Above so many scopes the empty ones are dropped."""


class _Cell:
    """The places taken in one second, which leave together, 60 s after the last of them."""

    __slots__ = ("last", "places", "second")

    def __init__(self, second: int, places: int, last: float) -> None:
        self.second, self.places, self.last = second, places, last


class _Window:
    """One scope's sliding minute, in the same cells of a second as the script counts."""

    __slots__ = ("_cells", "held")

    def __init__(self) -> None:
        self._cells: deque[_Cell] = deque()
        self.held = 0

    def expire(self, now: float) -> None:
        while self._cells and self._cells[0].last + WINDOW_SECONDS <= now:
            self.held -= self._cells.popleft().places

    def take(self, places: int, now: float) -> None:
        newest = self._cells[-1] if self._cells else None
        if newest is not None and newest.second == int(now):
            newest.places += places
            newest.last = now
        else:
            self._cells.append(_Cell(int(now), places, now))
        self.held += places

    def next_free(self, limit: int, now: float) -> float:
        """When the places held fall below the limit."""
        if not self._cells:
            return now
        left = self.held
        for cell in self._cells:
            left -= cell.places
            if left < limit:
                return cell.last + WINDOW_SECONDS
        return now + WINDOW_SECONDS


class LocalWindows:
    """Sliding minutes by scope, on this process's own clock; they answer as the script does."""

    def __init__(self) -> None:
        self._windows: dict[Hashable, _Window] = {}

    def clear(self) -> None:
        """Start a new minute everywhere."""
        self._windows.clear()

    def take(self, scopes: Sequence[Hashable], shares: Sequence[int], limits: Sequence[int], places: int) -> Taken:
        """Take up to so many places in all scopes or in none.

        `shares` are what this process may admit a minute; `limits` are the whole limits, for the answer alone.
        """
        now, wall = time.monotonic(), time.time()
        if len(self._windows) > MANY_SCOPES:
            self._forget_empty(now)
        windows = [self._windows.setdefault(scope, _Window()) for scope in scopes]
        for window in windows:
            window.expire(now)
        room = min(share - window.held for window, share in zip(windows, shares, strict=True))
        granted = max(0, min(places, room))
        if granted:
            for window in windows:
                window.take(granted, now)
        states = tuple(
            ScopeState(limit, max(0, share - window.held), int((wall + window.next_free(share, now) - now) * 1000))
            for window, share, limit in zip(windows, shares, limits, strict=True)
        )
        return Taken(granted, int(wall * 1000), states)

    def _forget_empty(self, now: float) -> None:
        for window in self._windows.values():
            window.expire(now)
        self._windows = {scope: window for scope, window in self._windows.items() if window.held}
