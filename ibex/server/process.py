"""What every Python process of a node does first and last: its title, its limits, its bond to the supervisor."""

import asyncio
import ctypes
import faulthandler
import os
import resource
import signal
import sys
from collections.abc import Coroutine
from typing import Any

import setproctitle
import uvloop

_PR_SET_PDEATHSIG = 1


def begin_process(title: str, *, parent: int | None = None) -> None:
    """Name the process (`ibex: <title>`), forbid core dumps, allow all the files the system lets it open.

    When it is aborted or crashes, it says on standard error in which functions it stood.

    With `parent` it is told by SIGTERM when that process dies, and ends at once when it is dead already.
    """
    stderr = sys.__stderr__ or sys.stderr  # of the process, whoever reads `sys.stderr` meanwhile
    if stderr is not None:  # the caller closed it
        faulthandler.enable(stderr)
    setproctitle.setproctitle(f"ibex: {title}")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    signal.signal(signal.SIGINT, signal.SIG_IGN if parent is not None else signal.default_int_handler)
    if parent is not None:
        die_with(parent)


def die_with(parent: int) -> None:
    """Have the kernel send SIGTERM when the parent dies; where there is no such kernel, the control channel tells."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(0)


def run_process(main: Coroutine[Any, Any, int]) -> int:
    """Run to the end on uvloop; answers the exit code."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)
