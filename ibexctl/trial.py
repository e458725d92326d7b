"""A server for one trial: on a free port, with embedded stores in a new data directory, by default on the sandbox."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ibex.config import EMBEDDED, Settings, child_environment
from ibex.engines.datadir import DataDirectory
from ibex.engines.postgres_home import find_home
from ibex.errors import OperatorError
from ibexctl.operation import read_settings
from ibexctl.output import note

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


@contextmanager
def own_server(*, has_quiet_log: bool = True, **overrides: Any) -> Iterator[tuple[str, Settings]]:
    """Its address and settings while it runs; afterwards it and its data are gone.

    Its log goes to standard error, from warnings up; unless it is to be quiet, all of it goes to `server.log` in the
    data directory. `overrides` are further settings.
    """
    with TemporaryDirectory(prefix="ibex-trial-") as directory, ExitStack() as stack:
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
        log = None if has_quiet_log else stack.enter_context((Path(directory) / "server.log").open("wb"))
        stack.enter_context(ending_on_sigterm())
        note("Starting a server for this trial; that takes some seconds …")
        server = subprocess.Popen(
            [sys.executable, "-m", "ibexctl", "serve", "--json"],
            env=child_environment(settings, with_provider_keys=False),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            try:
                address = _address_of(server)
            except OperatorError:
                _show_end(Path(directory) / "server.log")
                raise
            yield address, settings
        finally:
            _stop(server)
            find_home(DataDirectory(settings.data_dir)).remove()


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


def _show_end(log: Path) -> None:
    """The last words of a server that did not start, where they went into a file."""
    if log.exists():
        note("\n".join(log.read_text(errors="replace").splitlines()[-20:]))


def _stop(server: subprocess.Popen[str]) -> None:
    server.terminate()
    try:
        server.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    if server.stdout is not None:
        server.stdout.close()
