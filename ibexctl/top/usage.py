"""What a process and those it started use, as /proc tells."""

from collections.abc import Iterator
from pathlib import Path

from ibexctl.bench.processes import cpu_seconds, resident_bytes


def family(pid: int) -> Iterator[int]:
    """A process and its children, and theirs."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found = children.read_text().split()
        except OSError:  # the thread has just ended
            continue
        for child in found:
            yield from family(int(child))


def family_cpu_seconds(pid: int) -> float | None:
    """Processor time of a process and of its children that live."""
    found = [seconds for member in family(pid) if (seconds := cpu_seconds(member)) is not None]
    return sum(found) if found else None


def family_memory_bytes(pid: int) -> int | None:
    """Resident memory of a process and its children; what they share counts for each."""
    found = [size for member in family(pid) if (size := resident_bytes(member)) is not None]
    return sum(found) if found else None
