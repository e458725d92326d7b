"""One house for all clients, and what its upstream was sent.

The clients live in an environment of their own (`make test-clients`), without ibex: the house is started with the
interpreter that IBEX_TEST_PYTHON names.
"""

import json
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

from tests.acceptance import conftest as acceptance
from tests.acceptance.conftest import House

house = acceptance.house


@pytest.fixture
def last_sent(house: House) -> Callable[[], dict[str, Any]]:
    """Reads the body of the last request that reached the upstream."""
    upstream = house.facts["upstream"]["url"].removesuffix("/v1")

    def read() -> dict[str, Any]:
        with urllib.request.urlopen(f"{upstream}/_sandbox/requests?limit=1", timeout=10) as answer:
            (entry,) = json.load(answer)["requests"]
        return json.loads(entry["body"])

    return read


@pytest.fixture
def count_turns(house: House) -> Callable[[str], int]:
    """Counts the recorded turns of a session, once there are any."""

    def count(session: str) -> int:
        deadline = time.monotonic() + 20
        while not (traces := house.ctl("trace", "list", "--session", session)["traces"]):
            assert time.monotonic() < deadline, "no turn was recorded"
        return len(traces)

    return count
