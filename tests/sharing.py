"""How the tests are shared out to processes: a file each, and one process for those that load the whole machine."""

from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

HEAVY = ("tests/chaos/", "tests/network/", "tests/ibexctl/demo/")
"""They start many servers and keep every core busy, and what they promise has a time. So they never meet."""


class Sharing(LoadFileScheduling):  # type: ignore[misc]
    """A scope is what one process gets at a time."""

    def _split_scope(self, nodeid: str) -> str:
        return "heavy" if nodeid.startswith(HEAVY) else str(super()._split_scope(nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Sharing:
    """Share them out this way, whatever `--dist` says."""
    return Sharing(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The heavy ones take longest: they go first, in the random order that they have."""
    items.sort(key=lambda item: not item.nodeid.startswith(HEAVY))
