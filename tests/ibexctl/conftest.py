"""The command line on real stores: in this process, and as the program it is."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ibexctl.app import run


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command did: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """The one JSON object on standard output."""
        assert self.out.count("\n") == 1, self.out
        return json.loads(self.out)

    @property
    def error(self) -> dict[str, Any]:
        """The error that `--json` reported."""
        assert self.code == 1, self
        found: dict[str, Any] = self.data["error"]
        return found


Run = Callable[..., Outcome]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, data_dir: Path) -> pytest.MonkeyPatch:
    """No setting of the outside world, and a data directory of its own."""
    for name in os.environ:
        if name.startswith(("IBEX_", "OPENAI_")) or name in {"POSTGRES_DSN", "REDIS_URL", "CLICKHOUSE_DSN"}:
            monkeypatch.delenv(name)
    monkeypatch.setenv("IBEX_ENV_FILE", os.devnull)
    monkeypatch.setenv("IBEX_DATA_DIR", str(data_dir))
    return monkeypatch


@pytest.fixture
def ibexctl(environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process."""

    def run_here(*words: object) -> Outcome:
        capsys.readouterr()
        code = run([str(word) for word in words])
        return Outcome(code, *capsys.readouterr())

    return run_here


@pytest.fixture
def on_stores(
    environment: pytest.MonkeyPatch, postgres_database: Any, redis_url: str, clickhouse_dsn: str
) -> Mapping[str, str]:
    """Real stores by their addresses, of which ClickHouse has no schema yet."""
    stores = {
        "IBEX_POSTGRES_DSN": postgres_database.dsn,
        "IBEX_POSTGRES_ADMIN_DSN": postgres_database.admin_dsn,
        "IBEX_REDIS_URL": redis_url,
        "IBEX_CLICKHOUSE_DSN": clickhouse_dsn,
    }
    for name, dsn in stores.items():
        environment.setenv(name, dsn)
    return stores


def run_apart(*words: object, stdin: str = "", **environ: str) -> Outcome:
    """Run a command as a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "ibexctl", *(str(word) for word in words)],
        input=stdin,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)
