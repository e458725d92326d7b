"""The wheel carries what it needs: an installation without the checkout finds its migrations and its load test."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

QUESTIONS = """
import json, pathlib, ibex, ibexctl
from ibex.stores.migrations import find_migrations
print(json.dumps({
    "ibex": ibex.__file__,
    "postgres": [migration.label for migration in find_migrations("postgres")],
    "clickhouse": [migration.label for migration in find_migrations("clickhouse")],
    "locustfile": (pathlib.Path(ibexctl.__file__).parent / "_loadtests" / "locustfile.py").is_file(),
    "data": sorted(path.name for path in pathlib.Path(ibex.__file__).parent.rglob("*.lua")),
}))
"""


def stems(kind: str) -> list[str]:
    return sorted(path.name.removesuffix(".up.sql") for path in (ROOT / "infra/migrations" / kind).glob("*.up.sql"))


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel's contents alone: built without a network, installed without dependencies."""
    built = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(built)],
        cwd=ROOT, check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    (wheel,) = built.glob("*.whl")
    target = tmp_path_factory.mktemp("installation")
    with zipfile.ZipFile(wheel) as archive:  # a pure wheel is installed by unpacking it
        archive.extractall(target)
    return target


def test_migrations_and_load_test_are_found_from_an_installed_wheel(installation: Path) -> None:
    outcome = subprocess.run(
        [sys.executable, "-c", QUESTIONS],
        cwd=installation, env={"PYTHONPATH": str(installation)}, check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    found = json.loads(outcome.stdout)

    assert found["ibex"].startswith(str(installation))
    assert found["postgres"] == stems("postgres") != []
    assert found["clickhouse"] == stems("clickhouse") != []
    assert found["locustfile"]
    assert found["data"] == sorted(path.name for path in (ROOT / "ibex").rglob("*.lua"))


def test_the_wheel_names_the_command_and_the_licence(installation: Path) -> None:
    (metadata,) = installation.glob("*.dist-info")

    assert "ibexctl = ibexctl.app:main" in (metadata / "entry_points.txt").read_text()
    assert "Apache License" in (metadata / "licenses" / "LICENSE").read_text()
    assert not (installation / "tests").exists()
