"""What a service manager hears of a node, over a real datagram socket."""

import asyncio
import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from ibex.config import Settings, take_notify_socket
from ibex.errors import ConfigurationError, OperatorError
from ibex.server.supervision.notify import Notifier
from ibex.server.supervision.status import request_reload
from tests.server.nodes import running


class ServiceManager:
    """A socket that hears what systemd would."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address.replace("@", "\0", 1))
        self.socket.setblocking(False)
        self.heard: list[dict[str, str]] = []

    def hear(self) -> list[str]:
        """The name of the first assignment of each message so far."""
        with suppress(BlockingIOError):
            while True:
                lines = self.socket.recv(4096).decode().split("\n")
                self.heard.append(dict(line.split("=", 1) for line in lines))
        return [next(iter(message)) for message in self.heard]


@pytest.fixture(params=["path", "abstract name"])
def manager(request: pytest.FixtureRequest, data_dir: Path) -> Iterator[ServiceManager]:
    name = str(data_dir / "notify") if request.param == "path" else f"@ibex-test-{os.getpid()}"
    found = ServiceManager(name)
    yield found
    found.socket.close()


async def test_a_node_says_when_it_serves_reloads_and_stops(settings: Settings, manager: ServiceManager) -> None:
    async with running(settings, notifier=Notifier(manager.address)) as node:
        assert manager.hear() == ["READY"]
        assert manager.heard[0] == {"READY": "1", "STATUS": f"Serves on {node.status.url}"}
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        await asyncio.to_thread(request_reload, settings)
        assert manager.hear() == ["READY", "RELOADING", "READY"]
        assert before <= int(manager.heard[1]["MONOTONIC_USEC"]) * 1000 + 1000
        await node.stop()

    assert manager.hear() == ["READY", "RELOADING", "READY", "STOPPING"]


async def test_a_reload_that_is_refused_ends_as_ready_too(settings: Settings, manager: ServiceManager) -> None:
    def refuse() -> Settings:
        raise ConfigurationError("IBEX_PORT: it is wrong", hint="Mend it.")

    async with running(settings, notifier=Notifier(manager.address), reload=refuse):
        with pytest.raises(OperatorError):
            await asyncio.to_thread(request_reload, settings)
        assert manager.hear() == ["READY", "RELOADING", "READY"]


def test_nobody_is_told_ready_once_the_node_stops(manager: ServiceManager) -> None:
    notifier = Notifier(manager.address)

    with notifier.reloading():
        notifier.stopping()

    assert manager.hear() == ["RELOADING", "STOPPING"]


def test_a_manager_that_is_gone_hinders_nothing(data_dir: Path) -> None:
    Notifier(str(data_dir / "gone")).ready("Serves")
    Notifier(None).ready("Serves")


def test_no_child_inherits_the_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "@manager")

    assert take_notify_socket() == "@manager"
    assert "NOTIFY_SOCKET" not in os.environ
    assert take_notify_socket() is None
