"""Become another program that dies with its parent: run as a script, never imported, so that it needs nothing of ibex.

    python -I -S launch.py PARENT DEATH_SIGNAL UID GID NAME PROGRAM [ARGUMENT ...]

UID and GID are `-` to stay who we are; NAME is what the program is told that it is called, `-` for its path.

PR_SET_PDEATHSIG is lost at a change of uid, so it is set after it, and survives the exec. It follows the thread that
started this process, which therefore has to be the parent's main thread.
"""

import ctypes
import os
import resource
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Change identity, tie this process to its parent, and exec."""
    parent, death_signal, uid, gid, name, program, *arguments = sys.argv[1:]
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if uid != "-":
        os.setgroups([])
        os.setgid(int(gid))
        os.setuid(int(uid))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
    if os.getppid() != int(parent):
        sys.exit("the parent died before its child started")
    try:
        os.execv(program, [program if name == "-" else name, *arguments])  # noqa: S606 - the caller's own, without a shell
    except OSError as error:
        sys.exit(f"{program} cannot be run: {error.strerror}")


if __name__ == "__main__":
    main()
