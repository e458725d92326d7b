"""The development composition: what it mounts exists, what it sets is read, and nobody but this machine reaches it."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from ibex.config import load_settings
from tests.infra.places import BESIDES, INFRA, strangers

FILE = INFRA / "compose" / "compose.dev.yaml"
COMPOSITION: dict[str, Any] = yaml.safe_load(FILE.read_text())
SERVICES: dict[str, Any] = COMPOSITION["services"]
IBEX = [name for name, service in SERVICES.items() if service.get("image") == "ibex:dev"]


def mounts() -> Iterator[tuple[str, str]]:
    """Service and source of every mount."""
    for name, service in SERVICES.items():
        for mount in service.get("volumes", []):
            yield name, mount.partition(":")[0]


def environment(name: str) -> dict[str, str]:
    """What a service is told, where the machine that starts it sets nothing."""
    return {key: re.sub(r"\$\{\w+:-(.*?)\}", r"\1", value) for key, value in SERVICES[name]["environment"].items()}


def test_compose_itself_accepts_it() -> None:
    if shutil.which("docker") is None:
        pytest.skip("docker is not installed")
    if subprocess.run(["docker", "compose", "version"], capture_output=True).returncode != 0:
        pytest.skip("docker has no compose plugin")

    done = subprocess.run(["docker", "compose", "-f", FILE, "config", "--quiet"], capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (0, "")


def test_everything_that_is_mounted_exists() -> None:
    for name, source in mounts():
        if source.startswith("."):
            assert (FILE.parent / source).exists(), name
        else:
            assert source in COMPOSITION["volumes"], name


def test_ports_are_published_on_the_loopback_interface_alone() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]

    assert ports
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_an_image_has_a_version(name: str) -> None:
    tag = SERVICES[name]["image"].partition(":")[2]

    assert tag == "dev" if name in IBEX else re.match(r"v?\d+\.\d+", tag)


@pytest.mark.parametrize("name", IBEX)
def test_every_setting_is_read_and_ibex_accepts_them(name: str) -> None:
    assert strangers("\n".join(environment(name))) == set()
    settings = load_settings({"IBEX_ENV_FILE": "/dev/null", **environment(name)})

    assert settings.is_development
    assert settings.resolved_llm_mode == "sandbox"
    for field in ("postgres_dsn", "postgres_admin_dsn", "redis_url", "clickhouse_dsn"):
        assert re.search(r"[@/](\w+):\d+", getattr(settings, field).get_secret_value())[1] in SERVICES  # type: ignore[index]


def test_what_is_waited_for_tells_when_it_is_ready() -> None:
    for name, service in SERVICES.items():
        for needed, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                # ibex's own check comes with its image
                assert "test" in SERVICES[needed].get("healthcheck", {}) or needed in IBEX, (name, needed)


def test_the_door_leads_to_where_ibex_listens() -> None:
    door = (FILE.parent / "door.cfg").read_text()
    settings = load_settings({"IBEX_ENV_FILE": "/dev/null", **environment("ibex")})
    (published,) = SERVICES["ibex"]["ports"]
    prometheus = yaml.safe_load((INFRA / "prometheus" / "prometheus.yaml").read_text())
    (target,) = prometheus["scrape_configs"][0]["static_configs"][0]["targets"]

    assert set(re.findall(r"server ibex (\S+)", door)) == {f"{settings.host}:{settings.port}"}
    assert re.findall(r"bind :(\d+)", door) == [published.rpartition(":")[2], target.removeprefix("ibex:")]
    assert SERVICES["door"]["network_mode"] == "service:ibex"


def test_docker_waits_for_longer_than_a_stop_may_take() -> None:
    settings = load_settings({"IBEX_ENV_FILE": "/dev/null", **environment("ibex")})

    seconds = int(SERVICES["ibex"]["stop_grace_period"].removesuffix("s"))
    assert seconds >= settings.shutdown_delay + settings.shutdown_timeout + BESIDES
