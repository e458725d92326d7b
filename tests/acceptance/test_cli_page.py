"""The examples of docs/cli.md, run one after the other on a house of their own."""

import json
import os
import re
import shlex
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from ibex.domain.identity import DEV_AGENT_ID
from ibexctl.app import run
from tests.acceptance.conftest import House
from tests.shown_commands import CLI_PAGE, RUN, read_commands

SHOWN_TOKEN = "ibex_pat_2f1c6a0e-6f0b-4a53-9a0e-0d7f3c1b2a4d"
SHOWN_TURN = "0199a2f6-5a1e-7c3b-9d0e-3f1f2a6b7c8d"
SHOWN_SESSION = "chat-42"


def take_a_turn(house: House) -> str:
    """Have a turn recorded in the session the page names; its id."""
    body = json.dumps({"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello!"}]}).encode()
    headers = {**house.headers, "Content-Type": "application/json", "X-IBEX-Session-ID": SHOWN_SESSION}
    with urllib.request.urlopen(urllib.request.Request(f"{house.url}/v1/chat/completions", body, headers)) as reply:
        turn_id = str(reply.headers["X-IBEX-Turn-ID"])
    deadline = time.monotonic() + 20
    while not (house.ctl("trace", "list")["traces"] and house.ctl("session", "list")["sessions"]):
        assert time.monotonic() < deadline, "no turn was recorded"
    return turn_id


@pytest.mark.timeout(120)
def test_every_example_works_in_the_order_of_the_page(
    open_house: Callable[..., House],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    house = open_house()
    for name in os.environ.keys() - house.environ.keys():
        monkeypatch.delenv(name)
    for name, value in house.environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "directive.txt").write_text("Answer in German.")
    stand_ins = {SHOWN_TURN: take_a_turn(house), SHOWN_TOKEN: SHOWN_TOKEN}
    failed = {}

    for shown in read_commands("docs/cli.md"):
        if shown.row is None or RUN.get(shown.row) != CLI_PAGE:
            continue
        program, *words = shlex.split(shown.command)
        assert program == "ibexctl"
        if (code := run([stand_ins.get(word, word) for word in words])) != 0:
            failed[shown.command] = (code, *capsys.readouterr())
        if words[:2] == ["token", "mint"]:
            (stand_ins[SHOWN_TOKEN],) = set(re.findall(r"^token_id\s+(\S+)$", capsys.readouterr().out, re.MULTILINE))

    assert failed == {}
    assert house.ctl("agent", "show", str(DEV_AGENT_ID))["status"] == "archived"
