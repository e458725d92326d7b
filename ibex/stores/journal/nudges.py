"""Nudges: a datagram that tells the recorder there is something to read. Losing one costs a moment, never a turn."""

import asyncio
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

_SPACING = 0.02
"""Seconds: at most one nudge in this time."""
_MAX_PATH = 100
"""Bytes a unix address may surely have; a longer path is reached through its directory's descriptor."""


def nudge_path(journal_dir: Path) -> Path:
    """Where the recorder of this journal listens."""
    return journal_dir / "recorder.sock"


class Nudger:
    """The sending side, one per writer: the first nudge goes at once, a later one within 20 ms of the last."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self._timer: asyncio.TimerHandle | None = None
        self._is_due = False

    def nudge(self) -> None:
        """Send a nudge now, or when the spacing allows; one is always sent after the last call."""
        if self._timer is not None:
            self._is_due = True
            return
        # An absent recorder or a full queue: it reads the directory when it starts, and has nudges enough.
        with suppress(OSError), _Address(self._path) as address:
            self._socket.sendto(b"!", address)
        self._timer = asyncio.get_running_loop().call_later(_SPACING, self._elapse)

    def _elapse(self) -> None:
        self._timer = None
        if self._is_due:
            self._is_due = False
            self.nudge()

    def close(self) -> None:
        """Stop, sending a last nudge if one is owed."""
        if self._timer is not None:
            self._timer.cancel()
        if self._is_due:
            with suppress(OSError), _Address(self._path) as address:
                self._socket.sendto(b"!", address)
        self._socket.close()


class NudgeListener:
    """The receiving side, one per journal: calls back once for all nudges that are there."""

    def __init__(self, path: Path, on_nudge: Callable[[], None]) -> None:
        self._path = path
        self._on_nudge = on_nudge
        self._socket: socket.socket | None = None

    def __enter__(self) -> Self:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self._path.unlink(missing_ok=True)
        with _Address(self._path) as address:
            listener.bind(address)
        self._path.chmod(0o600)
        asyncio.get_running_loop().add_reader(listener, self._drain)
        self._socket = listener
        return self

    def __exit__(self, *_: object) -> None:
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
        self._path.unlink(missing_ok=True)

    def _drain(self) -> None:
        with suppress(BlockingIOError):
            while self._socket is not None:
                self._socket.recv(16)
        self._on_nudge()


class _Address:
    """A unix socket's address, usable for paths longer than a `sockaddr_un` holds."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._directory: int | None = None

    def __enter__(self) -> str:
        if len(os.fsencode(self._path)) <= _MAX_PATH:
            return str(self._path)
        self._directory = os.open(self._path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        return f"/proc/self/fd/{self._directory}/{self._path.name}"

    def __exit__(self, *_: object) -> None:
        if self._directory is not None:
            os.close(self._directory)
