"""The three demonstrations, run as a reader of the README runs them, but short."""

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

SHORT = {"crash": ("--seconds", "4"), "cut": ("--step", "150"), "hang": ("--seconds", "3")}
NOBODY_WAITS = "A caller waits no longer than usual"


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each prints with `--json`, and what it leaves behind; all three run side by side."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("IBEX_", "OPENAI_"))}
    running = {}
    for name, options in SHORT.items():
        place = tmp_path_factory.mktemp(name)
        running[name] = (
            place,
            subprocess.Popen(
                [sys.executable, "-m", "ibexctl", "demo", name, *options, "--json"],
                env=outside | {"IBEX_ENV_FILE": os.devnull, "TMPDIR": str(place)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            ),
        )
    found: dict[str, Any] = {}
    for name, (place, process) in running.items():
        out, errors = process.communicate(timeout=100)
        assert process.returncode in {0, 1}, errors
        found[name] = json.loads(out) | {"left": list(place.iterdir()), "narration": errors}
        assert "error" not in found[name], found[name]
    return found


@pytest.mark.parametrize("name", SHORT)
def test_a_demonstration_keeps_its_promises_and_leaves_nothing_behind(told: dict[str, Any], name: str) -> None:
    # whether anybody waited is for a machine that has nothing else to do
    broken = [promise["promise"] for promise in told[name]["promises"] if not promise["is_kept"]]
    assert [promise for promise in broken if not promise.startswith(NOBODY_WAITS)] == []
    assert told[name]["left"] == []


def test_a_crash_breaks_requests_off_and_loses_no_turn(told: dict[str, Any]) -> None:
    found = told["crash"]
    assert found["turns_seen_whole"] > 50
    assert found["requests_without_an_answer"] > 0
    assert found["checkpoints"].startswith(f"{found['turns_seen_whole']:,} once, 0 missing")
    assert re.search(r"kill -9 of all \d processes", found["narration"])


def test_a_cut_is_shown_with_its_error_in_place_of_the_torn_event(told: dict[str, Any]) -> None:
    found = told["cut"]
    assert found["whole_events_then_an_error"] > 20
    assert found["whole"] == 1
    assert found["recorded_as"]["incomplete"] == found["whole_events_then_an_error"] + 1
    assert found["shown"]["direct"][-1].startswith("  connection closed")
    assert any("PROVIDER_UNAVAILABLE" in line for line in found["shown"]["through_ibex"])


def test_while_redis_hangs_a_limit_holds_and_a_revocation_comes_through(told: dict[str, Any]) -> None:
    found = told["hang"]
    assert [load["failed"] for load in found["loads"]] == [0, 0, 0]
    assert all(load["answers"] > 10 for load in found["loads"])
    assert 0 < found["admitted_of_40_by_a_limit_of_20"] <= 20
    assert found["seconds_until_a_revoked_token_was_refused"] <= 5
