"""A server for one trial: on a free port, with embedded stores in a new data directory, by default on the sandbox."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ibex.config import EMBEDDED, Settings, child_environment
from ibex.engines.datadir import DataDirectory
from ibex.engines.postgres_home import find_home
from ibex.errors import OperatorError
from ibexctl.operation import read_settings
from ibexctl.output import note

if TYPE_CHECKING:
    from ibex.server.supervision.status import ProcessStatus

_STOP_SECONDS = 60.0
_STORES = ("postgres_dsn", "postgres_admin_dsn", "redis_url", "clickhouse_dsn")


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """SIGTERM ends the block by its `finally`s; by default it ends the process without, and leaves children behind."""
    before = signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Trial:
    """A server on data of its own: it can be killed, and started again on the same data and the same port."""

    def __init__(self, settings: Settings, log: Path | None) -> None:
        """Its log goes to the file `log`, else to standard error."""
        self.settings = settings
        self.address = ""
        self._log = log
        self._server: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start it and wait until it serves. Raises OperatorError."""
        with ExitStack() as stack:
            log = None if self._log is None else stack.enter_context(self._log.open("ab"))
            self._server = subprocess.Popen(
                [sys.executable, "-m", "ibexctl", "serve", "--json"],
                env=child_environment(self.settings, with_provider_keys=False),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        try:
            self.address = _address_of(self._server)
        except OperatorError:
            self._show_end()
            raise
        self.settings = self.settings.model_copy(update={"port": urlsplit(self.address).port})

    def processes(self) -> "list[ProcessStatus]":
        """Its processes, the supervisor first. Raises ServerNotRunning."""
        from ibex.server.supervision.status import request_status

        return request_status(self.settings).processes

    def upstream(self) -> str:
        """Where its provider listens. Raises ServerNotRunning."""
        from ibex.server.supervision.status import request_status

        return request_status(self.settings).upstream

    def pid_of(self, name: str) -> int:
        """One of its processes by its name, such as `worker 0`. Raises OperatorError when it is down."""
        pid = next((process.pid for process in self.processes() if process.name == name), None)
        if pid is None:
            raise OperatorError(f"The server's {name} is down.", hint="Try again on a quieter machine.")
        return pid

    def kill_everything(self) -> int:
        """SIGKILL to every process of it, the stores' included; how many there were."""
        pids = [process.pid for process in self.processes() if process.pid is not None]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        self.stop()
        return len(pids)

    def stop(self) -> None:
        """Have it end, and wait for that."""
        if self._server is None:
            return
        self._server.terminate()
        try:
            self._server.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        if self._server.stdout is not None:
            self._server.stdout.close()
        self._server = None

    def _show_end(self) -> None:
        """The last words of a server that did not start, where they went into a file."""
        if self._log is not None:
            note("\n".join(self._log.read_text(errors="replace").splitlines()[-20:]))


@contextmanager
def own_trial(*, has_quiet_log: bool = True, **overrides: Any) -> Iterator[Trial]:
    """A server while the block runs; afterwards it and its data are gone.

    Its log goes to standard error, from warnings up; unless it is to be quiet, all of it goes to `server.log` in the
    data directory. `overrides` are further settings.
    """
    with TemporaryDirectory(prefix="ibex-trial-") as directory, ending_on_sigterm():
        fixed: dict[str, Any] = {
            "env": "development",
            "host": "127.0.0.1",
            "port": 0,
            "workers": 1,
            "data_dir": Path(directory),
            "llm_mode": "sandbox",
            **dict.fromkeys(_STORES, EMBEDDED),
        }
        settings = read_settings(**fixed | overrides)
        if has_quiet_log and settings.log_level == "info":
            settings = settings.model_copy(update={"log_level": "warning"})
        trial = Trial(settings, None if has_quiet_log else Path(directory) / "server.log")
        note("Starting a server for this trial; that takes some seconds …")
        try:
            trial.start()
            yield trial
        finally:
            trial.stop()
            find_home(DataDirectory(settings.data_dir)).remove()


@contextmanager
def own_server(*, has_quiet_log: bool = True, **overrides: Any) -> Iterator[tuple[str, Settings]]:
    """The address and the settings of such a server."""
    with own_trial(has_quiet_log=has_quiet_log, **overrides) as trial:
        yield trial.address, trial.settings


def _address_of(server: subprocess.Popen[str]) -> str:
    """The address in the one object that `serve --json` prints when it is ready, or the reason why it is not."""
    line = server.stdout.readline() if server.stdout is not None else ""
    try:
        said = json.loads(line)
    except ValueError:
        raise OperatorError("The server did not start.", hint="Its own words are above.") from None
    if "error" in said:
        raise OperatorError(said["error"]["message"], hint=said["error"]["hint"])
    return str(said["url"])
