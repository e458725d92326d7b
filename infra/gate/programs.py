"""Runs programs as people would, `ibexctl … --json`, scripts and git; none of them outlives its caller."""

import asyncio
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""

_END_SECONDS = 30.0

IBEXCTL = (sys.executable, "-m", "ibexctl")


class ProgramFailed(Exception):
    """A program said that it could not do what it was asked."""


@dataclass(frozen=True, slots=True)
class Done:
    """How a program ended."""

    code: int
    out: str
    err: str

    @property
    def last_words(self) -> str:
        """The end of what it said, for a message."""
        return " ".join((self.err.strip() or self.out.strip()).splitlines()[-3:])


async def run_program(*words: str | Path, environ: Mapping[str, str] | None = None, cwd: Path = ROOT) -> Done:
    """Run a program until it ends; `environ` None: in this process's environment."""
    process = await asyncio.create_subprocess_exec(
        *map(str, words),
        cwd=cwd,
        env=environ,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, err = await process.communicate()
    finally:
        await _end(process)
    return Done(process.returncode or 0, out.decode(errors="replace"), err.decode(errors="replace"))


async def _end(process: asyncio.subprocess.Process) -> None:
    """As by Ctrl-C, on which benchmarks and tests stop what they started; killed when it does not end."""
    if process.returncode is None:
        process.send_signal(signal.SIGINT)
    try:
        async with asyncio.timeout(_END_SECONDS):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


async def ctl(
    *words: str,
    environ: Mapping[str, str] | None = None,
    program: Sequence[str | Path] = IBEXCTL,
    cwd: Path = ROOT,
) -> Any:
    """What `ibexctl … --json` says, whatever its exit code. Raises ProgramFailed when that is an error."""
    done = await run_program(*program, *words, "--json", environ=environ, cwd=cwd)
    try:
        said = json.loads(done.out)
    except ValueError:
        raise ProgramFailed(f"ibexctl {words[0]} exited with {done.code}: {done.last_words}") from None
    if "error" in said:
        raise ProgramFailed(f"ibexctl {' '.join(words[:2])}: {said['error']['message']}")
    return said


async def git(*words: str) -> str:
    """What git says of this checkout; nothing where there is no repository."""
    done = await run_program("git", *words)
    return done.out.strip() if done.code == 0 else ""
