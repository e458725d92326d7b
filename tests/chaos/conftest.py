"""One house for all that breaks it, and stores of a test's own."""

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.acceptance.conftest import kept_until_the_end, make_data_dir
from tests.chaos.houses import ChaosHouse
from tests.chaos.stores import OwnStores, open_stores


@pytest.fixture(scope="session")
def chaos_house() -> Iterator[ChaosHouse]:
    """Embedded stores, sandbox upstream, limits out of the way."""
    data_dir = make_data_dir()
    house = ChaosHouse.open(data_dir)
    with kept_until_the_end(house, data_dir):
        yield house


@pytest.fixture
async def own_stores() -> AsyncIterator[OwnStores]:
    """Stores of one test's own, which it may stop; it opens the nodes on them itself."""
    async with open_stores() as stores:
        yield stores
