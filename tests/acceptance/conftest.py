"""A whole house, started and asked as a user would: `ibexctl serve` with its embedded engines."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ibex.domain.identity import DEV_AGENT_ID, DEV_ORG_ID, DEV_TOKEN

START_SECONDS = 60
STOP_SECONDS = 40

PYTHON = os.environ.get("IBEX_TEST_PYTHON", sys.executable)
"""An interpreter that has ibex: the clients' own environment (`make test-clients`) has none."""


@dataclass
class House:
    """A running server, and its command line."""

    environ: dict[str, str]
    process: subprocess.Popen[str]
    facts: dict[str, Any]

    @property
    def url(self) -> str:
        """The proxy's address."""
        return str(self.facts["url"])

    @property
    def headers(self) -> dict[str, str]:
        """What a caller of the development seed presents."""
        return {"Authorization": f"Bearer {DEV_TOKEN}", "X-IBEX-Agent-ID": str(DEV_AGENT_ID)}

    def ctl(self, *arguments: str, stdin: str | None = None) -> Any:
        """Run `ibexctl … --json` against this house; what it printed."""
        done = subprocess.run(
            [PYTHON, "-m", "ibexctl", *arguments, "--json"],
            env=self.environ,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    def status(self) -> dict[str, Any]:
        """What `ibexctl status` says."""
        return self.ctl("status")

    def pids(self, prefix: str) -> list[int]:
        """The processes whose title begins so ("ibex: worker")."""
        return [process["pid"] for process in self.status()["processes"] if process["title"].startswith(prefix)]


def start_house(data_dir: Path, **settings: str) -> House:
    """Start a server on a free port and wait until it says that it serves."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("IBEX_", "OPENAI_"))}
    environ |= {"IBEX_ENV_FILE": os.devnull, "IBEX_DATA_DIR": str(data_dir), "IBEX_ACCESS_LOG": "false", **settings}
    log = (data_dir / "server.log").open("a")
    process = subprocess.Popen(
        [PYTHON, "-m", "ibexctl", "serve", "--port", "0", "--json"],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        start_new_session=True,
    )
    log.close()
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        process.wait(STOP_SECONDS)
        process.stdout.close()
        raise AssertionError((data_dir / "server.log").read_text())
    return House(environ, process, json.loads(line))


def stop_house(house: House) -> int:
    """Ctrl-C, and the exit code."""
    if house.process.poll() is None:
        house.process.send_signal(signal.SIGINT)
    code = house.process.wait(STOP_SECONDS)
    if house.process.stdout is not None:
        house.process.stdout.close()
    return code


def make_data_dir() -> Path:
    """A data directory with a path short enough for sockets."""
    return Path(tempfile.mkdtemp(prefix="ibex-"))


def remove_data_dir(data_dir: Path) -> None:
    """Remove it, and what PostgreSQL as root keeps outside it."""
    pointer = data_dir / "postgres-home"
    if pointer.exists():
        shutil.rmtree(pointer.read_text().strip(), ignore_errors=True)
    shutil.rmtree(data_dir, ignore_errors=True)


@contextmanager
def kept_until_the_end(house: House, data_dir: Path) -> Iterator[None]:
    """Limits out of the way; at the end it must stop well, and nothing of it is left."""
    try:
        house.ctl("org", "limit", str(DEV_ORG_ID), "--rpm", "1000000")
        yield
        assert stop_house(house) == 0
    finally:
        if house.process.poll() is None:
            house.process.kill()
        remove_data_dir(data_dir)


@pytest.fixture(scope="session")
def house() -> Iterator[House]:
    """One house for the tests that leave it as it was: sandbox upstream, limits out of the way."""
    data_dir = make_data_dir()
    running = start_house(data_dir)
    with kept_until_the_end(running, data_dir):
        yield running


@pytest.fixture
def open_house() -> Iterator[Callable[..., House]]:
    """Starts houses of one test's own, with settings of its own, and stops them."""
    started: list[House] = []

    def start(data_dir: Path | None = None, **settings: str) -> House:
        running = start_house(data_dir or make_data_dir(), **settings)
        started.append(running)
        return running

    yield start
    for running in started:
        stop_house(running)
        remove_data_dir(Path(running.environ["IBEX_DATA_DIR"]))
