"""One house for all that breaks it, and stores of a test's own."""

from collections.abc import AsyncIterator, Iterator

import pytest

from ibex.domain.identity import DEV_ORG_ID
from tests.acceptance.conftest import make_data_dir, remove_data_dir, stop_house
from tests.chaos.houses import ChaosHouse
from tests.chaos.stores import OwnStores, open_stores


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


@pytest.fixture
async def own_stores() -> AsyncIterator[OwnStores]:
    """Stores of one test's own, which it may stop; it opens the nodes on them itself."""
    async with open_stores() as stores:
        yield stores
