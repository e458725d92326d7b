"""One child process, from its start to its end: what it says, what it is told, and that nothing of it is left."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from ibex.errors import EngineFailed, OperatorError
from ibex.server.messages import AnyMessage, Channel, Drain, Failed, Ready, Report, Unfinished
from ibex.telemetry import spawn

log = logging.getLogger("ibex.supervisor")

READY_SECONDS = 60.0
GRACE_SECONDS = 5.0
"""How long after its time to drain a child may still take to end, before it is killed."""
HURRY_SECONDS = 1.0
ABORT_SECONDS = 1.0


@dataclass(frozen=True)
class Program:
    """What a child runs. To its command are added `--control FD` and `--parent PID`."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(repr=False)
    sockets: Sequence[socket.socket] = ()


class Child:
    """One process from its start to its end; the owner of its end of the control channel."""

    def __init__(
        self, name: str, on_message: "Callable[[Child, AnyMessage], None]", on_end: "Callable[[Child], None]"
    ) -> None:
        self.name = name
        self.facts: dict[str, Any] = {}
        """What it said about itself when it was ready and in its latest report."""
        self.snapshot: bytes | None = None
        """Its latest metrics."""
        self.started = time.monotonic()
        self.is_ready = False
        self.heard = 0
        """How many messages it has sent."""
        self._failure: Failed | None = None
        self._unfinished: Unfinished | None = None
        self._on_message = on_message
        self._on_end = on_end
        self._has_ended = False
        self._settled = asyncio.Event()
        self._patience: asyncio.Timeout | None = None
        self._is_hurried = False
        self._channel: Channel
        self._said_all = asyncio.Event()
        self._process: asyncio.subprocess.Process

    @classmethod
    async def start(
        cls,
        program: Program,
        on_message: "Callable[[Child, AnyMessage], None]" = lambda _child, _message: None,
        on_end: "Callable[[Child], None]" = lambda _child: None,
    ) -> Self:
        """Execute a program in a session of its own, so that a terminal's Ctrl-C reaches the supervisor alone.

        `on_end` is called once, when the process has ended and all it said was heard.
        """
        child = cls(program.name, on_message, on_end)
        ours, theirs = socket.socketpair()
        child._channel = await Channel.open(ours, child._receive, child._lose)
        try:
            child._process = await asyncio.create_subprocess_exec(
                *program.command,
                *("--control", str(theirs.fileno()), "--parent", str(os.getpid())),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sys.stderr.fileno(),
                env=dict(program.environment),
                pass_fds=[theirs.fileno(), *(sock.fileno() for sock in program.sockets)],
                start_new_session=True,
            )
        finally:
            theirs.close()
        return child

    @property
    def pid(self) -> int:
        """Its process id, also that of its session and process group."""
        return self._process.pid

    @property
    def lifetime(self) -> float:
        """Seconds since it was started."""
        return time.monotonic() - self.started

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.returncode is None

    @property
    def unfinished(self) -> Unfinished | None:
        """What it has cut, once it has ended: as it said itself, or by its latest report when something ended it."""
        if self._unfinished is not None or self._process.returncode in {None, 0}:
            return self._unfinished
        streams = int(self.facts.get("streams", 0))
        others = int(self.facts.get("in_flight", 0)) - streams
        return Unfinished(others, streams) if others or streams else None

    def send(self, message: AnyMessage) -> None:
        """Tell it something; swallowed when it is gone."""
        self._channel.send(message)

    def offer(self, message: AnyMessage) -> None:
        """Tell it something that can be spared."""
        self._channel.offer(message)

    async def wait(self) -> int:
        """Its exit code (negative: the signal that killed it), once it has ended and all it said was heard."""
        code = await self._process.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HURRY_SECONDS):
                await self._said_all.wait()
        await self._channel.close()
        if not self._has_ended:
            self._has_ended = True
            self._settled.set()
            self._on_end(self)
        return code

    async def wait_ready(self) -> bool:
        """Whether it said that it serves, before it ended and within a minute."""
        ended = spawn(self.wait(), name=f"first wait for {self.name}")
        try:
            async with asyncio.timeout(READY_SECONDS):
                await self._settled.wait()
        except TimeoutError:
            log.error("process did not become ready", extra={"child": self.name, "pid": self.pid})
        finally:
            ended.cancel()
        return self.is_ready

    def explain_failure(self) -> OperatorError:
        """Why it is not ready, for the operator."""
        if self._failure is not None:
            return OperatorError(f"{self.name}: {self._failure.message}", hint=self._failure.hint)
        return EngineFailed(f"The process {self.name} did not start.", hint="Its own messages are above.")

    async def stop(self, drain_seconds: float, *, has_successor: bool = False) -> None:
        """Have it end: ask, wait for its time to drain and a little more, then kill it. One not yet ready is killed."""
        if self.is_ready:
            seconds = 0.0 if self._is_hurried else drain_seconds
            self.send(Drain(seconds, has_successor))
            try:
                async with asyncio.timeout(seconds + GRACE_SECONDS) as self._patience:
                    await self.wait()
            except TimeoutError:
                log.warning("process did not end in time; killed", extra={"child": self.name, "pid": self.pid})
            finally:
                self._patience = None
        await self.kill()

    def hurry(self) -> None:
        """When it is being stopped, or will be: do not wait for what it still does."""
        self._is_hurried = True
        if self._patience is not None and not self._patience.expired():
            self.send(Drain(0))
            self._patience.reschedule(asyncio.get_running_loop().time() + HURRY_SECONDS)

    async def abort(self) -> None:
        """End one that hangs: have it say on standard error where it stands, if it still can, and kill it."""
        with contextlib.suppress(ProcessLookupError, TimeoutError):
            os.kill(self.pid, signal.SIGABRT)
            async with asyncio.timeout(ABORT_SECONDS):
                await self.wait()
        await self.kill()

    async def kill(self) -> None:
        """End it now, with its process group."""
        if self.is_alive:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            await self.wait()

    def _receive(self, message: AnyMessage) -> None:
        self.heard += 1
        match message:
            case Ready(facts):
                self.facts.update(facts)
                self.is_ready = True
                self._settled.set()
            case Failed():
                self._failure = message
            case Unfinished():
                self._unfinished = message
            case Report(snapshot, facts):
                self.snapshot = snapshot
                self.facts.update(facts)
            case _:
                pass
        self._on_message(self, message)

    def _lose(self) -> None:
        self._said_all.set()
