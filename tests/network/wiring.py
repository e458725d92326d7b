"""Machines of a test's own: network namespaces, wired to two networks, with cables that can be cut.

    back    the stores and every node                 10.73.0.0/24
    front   the clients, the provider and every node  10.73.1.0/24

Nothing of it is seen from the machine that runs the tests, and nothing leaves: each switch lies in a namespace as well.
"""

import contextlib
import ctypes
import os
import shutil
import socket
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)

STORES, WORLD = "stores", "world"
"""The machines that hold the switches: that of the stores, and that of the clients and the provider."""
POSTGRES, REDIS, CLICKHOUSE = "10.73.0.11", "10.73.0.12", "10.73.0.13"
"""Each store has an address of its own, so that it can be cut off alone."""
PROVIDER = "10.73.1.1"


def why_not() -> str | None:
    """Why no namespace can be had here; None when one can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "the program `ip` (iproute2) is not installed"
    name = f"ibex-{uuid.uuid4().hex[:8]}"
    attempts = (
        ("netns", "add", name),
        ("-n", name, "link", "add", "switch", "type", "bridge"),
        ("-n", name, "link", "add", "one", "type", "veth", "peer", "name", "other"),
        ("netns", "delete", name),
    )
    for attempt in attempts:
        tried = subprocess.run(["ip", *attempt], capture_output=True, text=True)
        if tried.returncode != 0:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
            return f"no network of namespaces can be made: {tried.stderr.strip()}"
    return None


@dataclass(frozen=True, slots=True)
class Machine:
    """One namespace."""

    namespace: str
    front: str = ""
    """Its address towards the clients."""

    @property
    def prefix(self) -> tuple[str, ...]:
        """What stands before a command that is to run there."""
        return ("ip", "netns", "exec", self.namespace)

    def pids(self) -> list[int]:
        """Every process there."""
        return [int(pid) for pid in _ip("netns", "pids", self.namespace).split()]

    def open_socket(self, address_info: tuple[int, int, int, str, object]) -> socket.socket:
        """A socket that belongs to that machine, wherever it is used: aiohttp's `socket_factory`."""
        family, kind, protocol, *_ = address_info
        with _inside(self.namespace):
            return socket.socket(family, kind, protocol)

    @contextlib.contextmanager
    def cut_off_from(self, *stores: str) -> Iterator[None]:
        """Nothing more reaches these stores from here: what is sent is dropped, and no connection is closed."""
        for store in stores:
            _ip("-n", self.namespace, "route", "add", "blackhole", f"{store}/32")
        try:
            yield
        finally:
            for store in stores:
                _ip("-n", self.namespace, "route", "delete", "blackhole", f"{store}/32")

    @contextlib.contextmanager
    def unplugged(self) -> Iterator[None]:
        """The cable to the stores is pulled out of their switch: silence both ways, and the link here stays up."""
        port, switch = f"back-{self.front.rpartition('.')[2]}", _namespace_of(STORES, self.namespace)
        _ip("-n", switch, "link", "set", port, "nomaster")
        try:
            yield
        finally:
            _ip("-n", switch, "link", "set", port, "master", "switch")


class Network:
    """The two networks and the machines on them; `close` removes all of it, and what still runs there."""

    def __init__(self) -> None:
        self._name = uuid.uuid4().hex[:8]
        self._count = 1
        self.machines: dict[str, Machine] = {}
        self.stores = self._add(STORES)
        self.world = self._add(WORLD, PROVIDER)
        self._switch(self.stores, POSTGRES, REDIS, CLICKHOUSE)
        self._switch(self.world, PROVIDER)

    def add(self, name: str) -> Machine:
        """One more machine, on both networks."""
        self._count += 1
        host = str(self._count)
        machine = self._add(name, f"10.73.1.{host}")
        self._plug(machine, "back", self.stores, host, f"10.73.0.{100 + int(host)}")
        self._plug(machine, "front", self.world, host, machine.front)
        return machine

    def close(self) -> None:
        """End what runs on the machines, and take them down."""
        for machine in self.machines.values():
            for pid in machine.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
            _ip("netns", "delete", machine.namespace)

    def _add(self, name: str, front: str = "") -> Machine:
        machine = Machine(f"ibex-{self._name}-{name}", front)
        _ip("netns", "add", machine.namespace)
        self.machines[name] = machine
        _ip("-n", machine.namespace, "link", "set", "lo", "up")
        return machine

    def _switch(self, machine: Machine, *addresses: str) -> None:
        _ip("-n", machine.namespace, "link", "add", "switch", "type", "bridge")
        for address in addresses:
            _ip("-n", machine.namespace, "address", "add", f"{address}/24", "dev", "switch")
        _ip("-n", machine.namespace, "link", "set", "switch", "up")

    def _plug(self, machine: Machine, network: str, switch: Machine, host: str, address: str) -> None:
        port = f"{network}-{host}"
        _ip(
            *("-n", machine.namespace, "link", "add", network, "type", "veth"),
            *("peer", "name", port, "netns", switch.namespace),
        )
        _ip("-n", machine.namespace, "address", "add", f"{address}/24", "dev", network)
        _ip("-n", machine.namespace, "link", "set", network, "up")
        _ip("-n", switch.namespace, "link", "set", port, "master", "switch", "up")


def _namespace_of(name: str, neighbour: str) -> str:
    return f"{neighbour.rsplit('-', 1)[0]}-{name}"


@contextlib.contextmanager
def _inside(namespace: str) -> Iterator[None]:
    """This thread in a namespace: what it opens there stays there."""
    with Path("/proc/thread-self/ns/net").open() as home, Path(f"/run/netns/{namespace}").open() as there:
        _enter(there.fileno())
        try:
            yield
        finally:
            _enter(home.fileno())


def _enter(namespace: int) -> None:
    if _libc.setns(namespace, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr.strip()}"
    return done.stdout
