"""Durations counted in buckets that grow by one percent: a quantile of millions of them costs a few kilobytes."""

from math import exp, log
from typing import Final

_PER_E: Final = 100.0
"""Buckets while a duration grows by the factor e: each is 1.005 % wide."""
_SMALLEST: Final = 1e-6
_LARGEST: Final = 1e4
_OFFSET: Final = -log(_SMALLEST) * _PER_E
_SIZE: Final = int(log(_LARGEST) * _PER_E + _OFFSET) + 1

QUANTILES: Final = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "p99_9": 0.999}


class Durations:
    """Counts of durations from 1 µs to 10,000 s; shorter and longer ones count as those."""

    __slots__ = ("_counts", "count", "largest", "total")

    def __init__(self) -> None:
        self._counts = [0] * _SIZE
        self.count = 0
        self.total = 0.0
        """Seconds, of all together."""
        self.largest = 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        self.add_many(seconds, 1)

    def add_many(self, seconds: float, count: int) -> None:
        """Count the same duration several times."""
        self._counts[int(log(min(max(seconds, _SMALLEST), _LARGEST)) * _PER_E + _OFFSET)] += count
        self.count += count
        self.total += seconds * count
        if seconds > self.largest:
            self.largest = seconds

    def quantile(self, share: float) -> float:
        """The duration (s) that this share of them did not exceed; 0 when there are none."""
        wanted, seen = share * self.count, 0
        for place, count in enumerate(self._counts):
            seen += count
            if count and seen >= wanted:
                return min(_middle(place), self.largest)
        return 0.0

    def summary(self) -> dict[str, float]:
        """Quantiles, mean and maximum, in milliseconds."""
        found = {name: self.quantile(share) for name, share in QUANTILES.items()}
        found["mean"] = self.total / self.count if self.count else 0.0
        found["max"] = self.largest
        return {name: round(seconds * 1e3, 3) for name, seconds in found.items()}

    def buckets(self) -> list[tuple[int, int]]:
        """Place and count of each bucket that is not empty: what `from_buckets` reads."""
        return [(place, count) for place, count in enumerate(self._counts) if count]

    def distribution(self) -> list[tuple[float, int]]:
        """Milliseconds and count of each bucket that is not empty, for a plot."""
        return [(round(_middle(place) * 1e3, 4), count) for place, count in self.buckets()]

    @classmethod
    def from_buckets(cls, buckets: list[tuple[int, int]], total: float, largest: float) -> "Durations":
        """What another process counted."""
        found = cls()
        for place, count in buckets:
            found._counts[place] = count
            found.count += count
        found.total, found.largest = total, largest
        return found


def _middle(place: int) -> float:
    return exp((place - _OFFSET + 0.5) / _PER_E)
