"""What processes use and where they run, as /proc tells; None and nothing where there is no /proc."""

import contextlib
import os
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float | None:
    """Processor time (s) of a process, all its threads and the kernel's work for it."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # the title may hold spaces and brackets of its own
    fields = text.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def resident_bytes(pid: int) -> int | None:
    """Resident memory of a process."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def sum_cpu(pids: Iterable[int]) -> float | None:
    """Processor time (s) of several processes together."""
    found = [cpu_seconds(pid) for pid in pids]
    known = [seconds for seconds in found if seconds is not None]
    return sum(known) if known and len(known) == len(found) else None


def sum_memory(pids: Iterable[int]) -> int | None:
    """Resident memory of several processes together; what they share counts for each."""
    known = [size for pid in pids if (size := resident_bytes(pid)) is not None]
    return sum(known) if known else None


def count_connections(port: int) -> int:
    """How many connections there are to a port of this machine (IPv4)."""
    wanted, established = f":{port:04X}", "01"
    try:
        rows = [line.split()[1:4] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    except OSError:
        return 0
    return sum(1 for local, _, state in rows if local.endswith(wanted) and state == established)


@dataclass(frozen=True, slots=True)
class Cores:
    """Which cores are for what is measured, and which for everything else; both empty: nothing is pinned."""

    measured: frozenset[int] = frozenset()
    rest: frozenset[int] = frozenset()
    reason: str = ""
    """Why nothing is pinned."""

    def describe(self) -> dict[str, object]:
        """For the result: what is pinned where."""
        return {
            "is_pinned": bool(self.measured),
            "measured": sorted(self.measured),
            "rest": sorted(self.rest),
            "reason": self.reason or None,
        }

    def pin_measured(self, pids: Iterable[int]) -> None:
        """Move all threads of these processes to the cores of what is measured."""
        for pid in pids if self.measured else ():
            for thread in Path(f"/proc/{pid}/task").iterdir():
                with contextlib.suppress(OSError):  # a thread that has just ended
                    os.sched_setaffinity(int(thread.name), self.measured)


def choose_cores(workers: int) -> Cores:
    """One core for each worker, the rest for load, provider and stores."""
    if not hasattr(os, "sched_setaffinity"):
        return Cores(reason="this system cannot pin processes to cores")
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) <= workers:
        return Cores(reason=f"{len(allowed)} cores are too few to give {workers} workers one each and leave one")
    return Cores(frozenset(allowed[:workers]), frozenset(allowed[workers:]))


@contextmanager
def off_the_measured_cores(cores: Cores) -> Iterator[None]:
    """This process, and whatever it starts, on the other cores; afterwards where it was."""
    if not cores.measured:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores.rest)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def describe_machine() -> dict[str, object]:
    """What a reader must know of the machine; its load tells whether it was quiet."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
