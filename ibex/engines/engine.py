"""What every embedded engine is: a child in a session of its own, ready when it answers, stopped by its own signal."""

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL, SIGTERM, Signals
from typing import ClassVar

from ibex.engines.datadir import DataDirectory
from ibex.errors import EngineFailed

_LAUNCHER = Path(__file__).with_name("launch.py")
_LONGEST_LOG = 8 << 20


@dataclass(frozen=True, slots=True)
class Account:
    """A system user to run a child as."""

    name: str
    uid: int
    gid: int


class Child:
    """A program that was started in a session of its own and dies with this process.

    Start it from the main thread: the death signal follows the thread that forked.
    """

    def __init__(self, process: subprocess.Popen[bytes], log: Path, log_start: int) -> None:
        self._process = process
        self._log = log
        self._log_start = log_start
        self.pid = process.pid

    @classmethod
    def spawn(
        cls,
        command: Sequence[str],
        *,
        log: Path,
        environ: Mapping[str, str],
        death_signal: Signals,
        account: Account | None = None,
        cwd: Path | None = None,
        stdin: bytes = b"",
        called: str = "-",
    ) -> "Child":
        """Start `command` with its output appended to `log` and the few bytes of `stdin` as its input.

        `called` is the name it is given, when not its path.
        """
        if log.exists() and log.stat().st_size > _LONGEST_LOG:
            log.replace(log.with_suffix(".log.1"))
        identity = ["-", "-"] if account is None else [str(account.uid), str(account.gid)]
        launcher = [
            sys.executable,
            "-I",
            "-S",
            str(_LAUNCHER),
            str(os.getpid()),
            str(int(death_signal)),
            *identity,
            called,
        ]
        with open(log, "ab", opener=_open_private) as output:
            log_start = output.tell()
            process = subprocess.Popen(  # noqa: S603
                [*launcher, *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=dict(environ),
                cwd=cwd,
                start_new_session=True,
            )
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(stdin)
        return cls(process, log, log_start)

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._process.poll()

    def signal(self, number: Signals) -> None:
        """Send a signal; nothing happens when the child has ended."""
        self._process.send_signal(number)

    async def wait(self) -> int:
        """The exit code, once it has ended. Several may wait."""
        with contextlib.suppress(OSError, AttributeError):  # not every system has pidfd_open
            await self._wait_for_descriptor()
        while (code := self._process.poll()) is None:  # noqa: ASYNC110 - a process gives no event elsewhere
            await asyncio.sleep(0.05)
        return code

    async def _wait_for_descriptor(self) -> None:
        if self._process.poll() is not None:
            return
        descriptor = os.pidfd_open(self.pid)
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(descriptor, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)

    async def stop(self, number: Signals, *, seconds: float) -> int:
        """Ask it to end by `number`, and kill it when it has not after `seconds`."""
        self.signal(number)
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(self.wait(), seconds)
        self.signal(SIGKILL)
        return await self.wait()

    def last_words(self) -> str:
        """The end of what it wrote to its log, as one line."""
        with self._log.open("rb") as log:
            log.seek(max(self._log_start, self._log.stat().st_size - 4096))
            lines = log.read().decode(errors="replace").split("\n")
        return " ".join(line.strip() for line in lines if line.strip())[-600:]


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


class Engine(ABC):
    """One embedded engine. Its address is known from the start and stays the same when it is started again."""

    name: ClassVar[str]
    label: ClassVar[str]
    start_seconds: ClassVar[float] = 60.0
    stop_seconds: ClassVar[float] = 30.0
    stop_signal: ClassVar[Signals] = SIGTERM
    """Ends it properly, and is also what it gets when this process dies."""

    def __init__(self, directory: DataDirectory, environ: Mapping[str, str]) -> None:
        self.directory = directory
        self._environ = environ
        self._child: Child | None = None

    @property
    @abstractmethod
    def location(self) -> Path:
        """Where its data lies."""

    @property
    @abstractmethod
    def version(self) -> str:
        """The engine's own version."""

    @property
    def log(self) -> Path:
        """Where its output goes."""
        return self.directory.log_dir / f"{self.name}.log"

    @property
    def pid(self) -> int | None:
        """Its process; None before the first start."""
        return None if self._child is None else self._child.pid

    async def start(self) -> None:
        """Start it and return when it answers. Raises EngineFailed, with the end of its log, when it does not."""
        if self._child is not None and self._child.exit_code is None:
            return
        if self._child is not None:
            self.directory.forget_child(self._child.pid)
        try:
            await self._prepare()
            self._child = self._spawn()
        except OSError as error:
            raise self._failure(f"{error.filename or self.location}: {error.strerror}") from error
        self.directory.record_child(self.name, self._child.pid, stop_signal=self.stop_signal)
        try:
            await self._until_ready(self._child)
        except BaseException:  # cancelled or failed: either way nothing may be left running
            await self.stop()
            raise

    async def wait(self) -> int:
        """The exit code, once it has ended."""
        if self._child is None:
            raise RuntimeError(f"{self.name} was never started")
        return await self._child.wait()

    async def stop(self) -> None:
        """Stop it properly and wait until it has ended."""
        if self._child is not None:
            await self._child.stop(self.stop_signal, seconds=self.stop_seconds)
            self.directory.forget_child(self._child.pid)

    @abstractmethod
    async def _prepare(self) -> None:
        """Make whatever must be there before it is spawned; may be called again at any time it does not run."""

    @abstractmethod
    def _spawn(self) -> Child:
        """Start its process."""

    @abstractmethod
    async def _is_ready(self) -> bool:
        """Whether it answers; OSError means not yet."""

    async def _until_ready(self, child: Child) -> None:
        deadline = time.monotonic() + self.start_seconds
        while child.exit_code is None:
            with contextlib.suppress(OSError, EOFError):
                if await self._is_ready():
                    return
            if time.monotonic() > deadline:
                raise self._failure(f"it gave no answer within {self.start_seconds:.0f} s. {child.last_words()}")
            await asyncio.sleep(0.02)
        raise self._failure(child.last_words() or f"exit code {child.exit_code}")

    def _failure(self, reason: str) -> EngineFailed:
        return EngineFailed(f"{self.label} did not start: {reason}", hint=f"Its log is {self.log}.")
