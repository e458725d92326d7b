"""A house that is started again however it ended, remembers all that its clients saw, and can be killed in parts."""

import asyncio
import os
import signal
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ibex.config import Settings, load_settings
from ibex.errors import ServerNotRunning
from ibex.server.supervision.status import NodeStatus, request_status
from tests.acceptance.conftest import STOP_SECONDS, House, start_house
from tests.chaos.load import KINDS, Kind, Load, Sight

ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "0"))
"""How many kills the long version has, `make test-chaos`; 0: the short one."""
OUTAGE_SECONDS = float(os.environ.get("CHAOS_OUTAGE_SECONDS", "1.5"))
PAUSE_SECONDS = 0.1 if ROUNDS else 0.0
"""Between the requests of a client: the long version is long, and its books are read by this process."""

in_the_long_version = pytest.mark.skipif(not ROUNDS, reason="takes minutes: `make test-chaos`")


@dataclass
class ChaosHouse(House):
    """A house that is started again on its data however it ended, and whose books are kept over all its lives."""

    settings: dict[str, str] = field(default_factory=dict)
    loads: list[Load] = field(default_factory=list)
    unnoted: int = 0
    """Turns of clients that are no load: they are only counted."""

    @classmethod
    def open(cls, data_dir: Path, **settings: str) -> "ChaosHouse":
        """Start a server with these settings."""
        first = start_house(data_dir, **settings)
        return cls(first.environ, first.process, first.facts, settings)

    @property
    def data_dir(self) -> Path:
        """Where its data lies."""
        return Path(self.environ["IBEX_DATA_DIR"])

    @property
    def sights(self) -> list[Sight]:
        """What its clients saw, in every test so far."""
        return [sight for load in self.loads for sight in load.sights]

    def load(
        self,
        *,
        clients: int,
        kinds: dict[Kind, int] = KINDS,
        is_fresh: bool = False,
        sessions: int | None = None,
        pause: float = PAUSE_SECONDS,
    ) -> Load:
        """A load on this house, which its books must account for."""
        load = Load(
            lambda: self.url,
            self.headers,
            clients=clients,
            kinds=kinds,
            is_fresh=is_fresh,
            sessions=sessions,
            pause=pause,
        )
        self.loads.append(load)
        return load

    def end(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.bury()

    def bury(self) -> int:
        """Wait for its end; the exit code."""
        code = self.process.wait(STOP_SECONDS)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code

    def start_again(self) -> None:
        """Start a server on the data of the one that ended."""
        again = start_house(self.data_dir, **self.settings)
        assert "url" in again.facts, again.facts
        self.process, self.facts = again.process, again.facts


def settings_of(house: House) -> Settings:
    """The settings a house was started with."""
    return load_settings({name: value for name, value in house.environ.items() if name.startswith("IBEX_")})


def node_of(house: House) -> NodeStatus:
    """What its supervisor says of its processes."""
    return request_status(settings_of(house))


async def all_up(house: House, restarts: int = 0) -> None:
    """Wait until every process serves, after at least so many restarts in all."""
    async with asyncio.timeout(60):
        while True:
            with suppress(ServerNotRunning):
                node = await asyncio.to_thread(node_of, house)
                if all(entry.is_up for entry in node.processes) and sum(p.restarts for p in node.processes) >= restarts:
                    return
            await asyncio.sleep(0.05)


async def kill_one(house: House, victim: str) -> None:
    """Kill one process, and wait until it is back."""
    node = node_of(house)
    (pid,) = [entry.pid for entry in node.processes if entry.name == victim]
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await all_up(house, sum(entry.restarts for entry in node.processes) + 1)


async def kill_node(house: ChaosHouse, victim: str) -> None:
    """Kill the supervisor alone, or every process at once; then start anew on the same data."""
    pids = [entry.pid for entry in node_of(house).processes if entry.pid is not None]
    for pid in pids if victim == "everything" else pids[:1]:
        os.kill(pid, signal.SIGKILL)
    await asyncio.to_thread(house.bury)
    await asyncio.to_thread(house.start_again)
