"""`ibexctl top` on a running house: one sample for programs, and the live screen on a terminal of its own."""

import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from ibex.domain.identity import DEV_ORG_ID
from tests.acceptance.conftest import House

BODY = b'{"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "hello"}]}'
SCREEN_OF_BEFORE = "\x1b[?25h\x1b[?1049l"
"""The cursor is shown, and the screen that was there comes back."""


@contextmanager
def traffic(house: House) -> Iterator[None]:
    """One client that asks on and on."""
    is_over = threading.Event()

    def ask() -> None:
        request = urllib.request.Request(f"{house.url}/v1/chat/completions", BODY, house.headers)
        request.add_header("Content-Type", "application/json")
        while not is_over.wait(0.005):
            with urllib.request.urlopen(request) as reply:
                reply.read()

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield
    finally:
        is_over.set()
        asking.join()


class Terminal:
    """`ibexctl top` on a pseudo-terminal of 80 by 24."""

    def __init__(self, house: House) -> None:
        self._near, far = pty.openpty()
        self.shown = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ibexctl", "top", "--interval", "0.5"],
            env=house.environ | {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"},
            stdin=far,
            stdout=far,
            stderr=far,
            start_new_session=True,
        )
        os.close(far)

    def read_until(self, text: str) -> None:
        """Wait until this is shown, styles left out."""
        deadline = time.monotonic() + 30
        while text not in self.shown:
            assert time.monotonic() < deadline, self.shown[-2000:]
            self._read()

    def press(self, keys: bytes) -> None:
        os.write(self._near, keys)

    def finish(self) -> int:
        """The exit code, when all is read."""
        with suppress(OSError):  # the far side is closed
            while True:
                self._read()
        os.close(self._near)
        return self.process.wait(30)

    def _read(self) -> None:
        piece = os.read(self._near, 1 << 16).decode(errors="replace")
        self.shown += re.sub(r"\x1b\[[0-9;]*m", "", piece)


def test_a_sample_says_what_the_node_does_and_for_whom(house: House) -> None:
    with traffic(house):
        time.sleep(1.5)  # the metrics of the workers are up to a second old
        sample = house.ctl("top", "--once", "--interval", "2")
    assert sample["state"] == "ok"
    assert sample["traffic"]["requests"] > 1
    assert sample["traffic"]["input_tokens"] > 0
    assert sample["latency"]["overhead"]["p99_ms"] > 0
    assert {check["name"] for check in sample["checks"]} == {"postgres", "redis", "clickhouse", "provider", "journal"}
    used = {process["name"]: process["cpu"] for process in sample["processes"]}
    assert set(used) >= {"supervisor", "worker 0", "recorder", "engine postgres", "engine clickhouse"}
    assert used["worker 0"] >= 0
    leaders = {leader["org_id"]: leader["turns"] for leader in sample["leaders"]}
    assert leaders[str(DEV_ORG_ID)] > 0


@pytest.mark.parametrize("way_out", ["q", "Ctrl-C"])
def test_the_screen_is_live_until_it_is_left_and_leaves_the_terminal_as_it_was(house: House, way_out: str) -> None:
    terminal = Terminal(house)
    terminal.read_until("engine clickhouse")
    terminal.read_until("rates over")  # the second look
    if way_out == "q":
        terminal.press(b"q")
    else:
        terminal.process.send_signal(signal.SIGINT)
    assert terminal.finish() == 0
    assert terminal.shown.endswith(SCREEN_OF_BEFORE)
    assert "Traceback" not in terminal.shown
