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


def running_program(pid: int) -> tuple[str, Path] | None:
    """The name of the program a process runs and its working directory.

    None when there is no such process, when it is not ours to ask, or where the system has no /proc.
    """
    process = Path("/proc") / str(pid)
    try:
        return (process / "exe").readlink().name, (process / "cwd").readlink()
    except OSError:
        return None


def find_processes(program: str, directory: Path) -> list[int]:
    """The pids of those that run a program of this name in this working directory, as far as we can see."""
    pids = [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if running_program(pid) == (program, directory)]
