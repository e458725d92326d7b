"""What a server's processes hold, looked at again and again during a run, and how much of it grows."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from ibex.server.supervision.status import ProcessStatus

LEAST_SECONDS = 120.0
"""A shorter run says nothing about growth: the first minute fills caches and the allocator's store."""
_SETTLED_SHARE = 1 / 3
"""So much of a run is left out of its slopes, for the same reason."""
_LOOKS = 240


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One process at one moment."""

    seconds: float
    memory_bytes: int
    descriptors: int
    tasks: int | None
    """Of its event loop, as it last said."""


class Growth:
    """The samples of each worker and of the recorder, over one run."""

    def __init__(self, processes: "Callable[[], Sequence[ProcessStatus]]", seconds: float) -> None:
        """`processes` tells what runs now; it is asked some two hundred times in a run of so many seconds."""
        self.samples: dict[str, list[Sample]] = {}
        self._processes = processes
        self._seconds = seconds
        self._next = 0.0

    def look(self, second: float) -> None:
        """So many seconds have passed."""
        if second < self._next:
            return
        self._next = second + self._seconds / _LOOKS
        for process in self._processes():
            is_watched = process.name.startswith("worker") or process.name == "recorder"
            if is_watched and process.pid is not None and process.memory_bytes is not None:
                sample = Sample(
                    seconds=second,
                    memory_bytes=process.memory_bytes,
                    descriptors=_count_descriptors(process.pid),
                    tasks=process.facts.get("tasks"),
                )
                self.samples.setdefault(process.name, []).append(sample)

    def as_data(self) -> dict[str, Any]:
        """For `--json`: by process and by what it holds, the first and the last value and the slope a minute."""
        return {name: self._describe(samples) for name, samples in self.samples.items()}

    def _describe(self, samples: Sequence[Sample]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for held in ("memory_bytes", "descriptors", "tasks"):
            points = [(s.seconds, getattr(s, held)) for s in samples if getattr(s, held) is not None]
            settled = [point for point in points if point[0] >= self._seconds * _SETTLED_SHARE]
            is_long = self._seconds >= LEAST_SECONDS and len(settled) > 1
            found[held] = {
                "first": points[0][1] if points else None,
                "last": points[-1][1] if points else None,
                "per_minute": round(slope(settled) * 60, 3) if is_long else None,
            }
        found["memory_timeline"] = [[sample.seconds, sample.memory_bytes] for sample in samples]
        return found


def slope(points: Sequence[tuple[float, float]]) -> float:
    """By how much y grows with x, by least squares; 0 for fewer than two different x."""
    if not points:
        return 0.0
    middle_x, middle_y = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    spread = sum((x - middle_x) ** 2 for x, _ in points)
    return sum((x - middle_x) * (y - middle_y) for x, y in points) / spread if spread else 0.0


def _count_descriptors(pid: int) -> int:
    try:
        return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return 0
