"""The units: systemd itself accepts them, and what they say agrees with what ibex does."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ibex.config import Settings, load_settings
from tests.infra.places import BESIDES, INFRA, SECRETS, strangers

UNITS = INFRA / "systemd"
NAMES = ["ibex.service", "ibex-migrate.service"]
MOST_EXPOSED = 2.0
"""`systemd-analyze security` of 10: what the hardening must not rise above."""


def values(unit: str, name: str) -> list[str]:
    """What a unit says of something, each time."""
    return re.findall(rf"^{name}=(.*)$", (UNITS / unit).read_text(), re.MULTILINE)


@pytest.fixture
def runnable(tmp_path: Path) -> Path:
    """The units where systemd can judge them: the program they start is one that exists."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    for name in NAMES:
        (tmp_path / name).write_text((UNITS / name).read_text().replace("/opt/ibex/bin/ibexctl", "/bin/true"))
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_systemd_accepts_the_unit(runnable: Path, name: str) -> None:
    done = subprocess.run(["systemd-analyze", "verify", str(runnable / name)], capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", NAMES)
def test_little_of_the_machine_is_exposed_to_it(runnable: Path, name: str) -> None:
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(runnable / name)]
    done = subprocess.run(command, capture_output=True, text=True)

    found = re.search(r"exposure level for \S+: ([\d.]+)", done.stdout)
    assert found is not None, done.stderr
    assert float(found[1]) <= MOST_EXPOSED


def test_systemd_waits_for_longer_than_a_stop_may_take() -> None:
    settings = load_settings({"IBEX_ENV_FILE": str(UNITS / "ibex.env")})
    (seconds,) = values("ibex.service", "TimeoutStopSec")

    assert int(seconds) >= settings.shutdown_delay + settings.shutdown_timeout + BESIDES


@pytest.mark.parametrize("name", [*NAMES, "ibex.env"])
def test_every_name_is_a_setting(name: str) -> None:
    assert strangers((UNITS / name).read_text()) == set()


@pytest.mark.parametrize("name", NAMES)
def test_every_secret_comes_from_a_credential_of_its_own(name: str) -> None:
    loaded = {line.partition(":")[0] for line in values(name, "LoadCredential")}
    read = dict(re.findall(r"^Environment=(\w+)_FILE=%d/(\w+)$", (UNITS / name).read_text(), re.MULTILINE))

    assert set(read) <= SECRETS
    assert loaded == set(read.values())


def test_the_example_sets_no_secret_and_serves_only_this_machine() -> None:
    settings = load_settings({"IBEX_ENV_FILE": str(UNITS / "ibex.env")})

    assert settings.host == Settings().host
    assert not any(name in (UNITS / "ibex.env").read_text() for name in SECRETS)
