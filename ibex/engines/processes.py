"""Processes told apart for certain: a pid alone may belong to another process by now."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A pid and when its process started, which together never come again on this machine."""

    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> Self | None:
        """Who has this pid now; None when nobody has (a zombie is nobody)."""
        started = _started(pid)
        return None if started is None else cls(pid, started)

    @classmethod
    def own(cls) -> Self:
        """This process."""
        identity = cls.of(os.getpid())
        if identity is None:
            raise RuntimeError("this process cannot find itself in the process table")
        return identity

    @classmethod
    def from_json(cls, value: Any) -> Self | None:
        """What `to_json` gave; None for anything else."""
        match value:
            case {"pid": int(pid), "started": str(started)} if pid > 1:
                return cls(pid, started)
        return None

    def to_json(self) -> dict[str, Any]:
        """For a run file."""
        return {"pid": self.pid, "started": self.started}

    @property
    def is_alive(self) -> bool:
        """Whether the very process still runs."""
        return _started(self.pid) == self.started


def _started(pid: int) -> str | None:
    if sys.platform != "linux":
        found = subprocess.run(  # noqa: S603
            ["/bin/ps", "-o", "state=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
        ).stdout.strip()
        return None if not found or found.startswith("Z") else found.split(maxsplit=1)[-1]
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()  # the name before it may contain anything
    return None if state in "ZX" else f"{boot}:{fields[18]}"


def find_processes(program: str, directory: Path) -> list[int]:
    """The pids of those that run a program of this name in this working directory; none where there is no /proc."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            is_wanted = (entry / "cwd").readlink() == directory and (entry / "exe").readlink().name == program
        except OSError:  # it has ended, or is not ours to ask
            continue
        if is_wanted and ProcessIdentity.of(int(entry.name)) is not None:
            found.append(int(entry.name))
    return found
