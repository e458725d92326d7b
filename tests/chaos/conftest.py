"""Houses for all that breaks them, and the memory of everything that their clients saw."""

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ibex.domain.identity import DEV_ORG_ID
from tests.acceptance.conftest import STOP_SECONDS, House, make_data_dir, remove_data_dir, start_house, stop_house
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


@pytest.fixture(scope="session")
def chaos_house() -> Iterator[ChaosHouse]:
    """Embedded stores, sandbox upstream, limits out of the way."""
    data_dir = make_data_dir()
    house = ChaosHouse.open(data_dir)
    try:
        house.ctl("org", "limit", str(DEV_ORG_ID), "--rpm", "1000000")
        yield house
        assert stop_house(house) == 0
    finally:
        if house.process.poll() is None:
            house.process.kill()
        remove_data_dir(data_dir)
