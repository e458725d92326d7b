"""The README's tour, taken as it is shown: its commands are run, and what it says comes out comes out."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.acceptance.conftest import House

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
SHOWN_ADDRESS = "127.0.0.1:8080"
PROGRAMS = Path(sys.executable).parent

PATTERNS = {
    r"01a20c2a-[0-9a-f-]*…?": r"[0-9a-f]{8}(?:-[0-9a-f]+){4}",
    r"\d{4}-\d\d-\d\dT[\d:.]+Z": r"\d{4}-\d\d-\d\dT[\d:.]+Z",
    r"chatcmpl-\w+": r"chatcmpl-\w+",
    r"\d+\.\d+": r"\d+(?:\.\d+)?",
    r"█+": r"█*",
    r"\s*…\s*": r".*",
    r"\s+": r"\s+",
}
"""What a shown line has that is another each time, and how it looks. `…` stands for whatever was left out."""


@dataclass(frozen=True)
class Step:
    """One command of the tour, and the lines shown under it."""

    command: str
    shown: list[str]


def section(title: str) -> str:
    """The text under one heading of the README."""
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def read_tour() -> list[Step]:
    """Every command behind a prompt, in order."""
    steps = list[Step]()
    for block in re.findall(r"^```console\n(.*?)^```$", section("A tour of 60 seconds"), re.MULTILINE | re.DOTALL):
        for text in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, *lines = re.sub(r"\\\n\s*", "", text).splitlines()
            steps.append(Step(command, [line for line in lines if line.strip("… ")]))
    return steps


def pattern_of(line: str) -> str:
    """A regular expression that is met by whatever differs from a shown line only in what differs each time."""
    pattern = ""
    for part in re.split("(" + "|".join(PATTERNS) + ")", line.strip()):
        looks = (looks for variable, looks in PATTERNS.items() if re.fullmatch(variable, part))
        pattern += next(looks, re.escape(part))
    return pattern


def missing(shown: list[str], output: str) -> str | None:
    """The first shown line that does not come out, in the order they are shown in."""
    lines = iter(output.splitlines())
    for line in shown:
        if not any(re.match(pattern_of(line), actual.strip()) for actual in lines):
            return line
    return None


class Visitor:
    """Somebody with a shell who types what the README shows."""

    def __init__(self, data_dir: Path) -> None:
        self.address = SHOWN_ADDRESS
        self._assignments = list[str]()
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("IBEX_", "OPENAI_"))}
        self.environ = kept | {"IBEX_ENV_FILE": os.devnull, "IBEX_DATA_DIR": str(data_dir)}

    def run(self, command: str) -> str:
        """Run one command after all assignments so far; what it printed."""
        port = self.address.rpartition(":")[2]
        command = command.replace("$PWD/.venv/bin", str(PROGRAMS)).replace(":8080", f":{port}")
        script = "\n".join([*self._assignments, command])
        done = subprocess.run(
            ["bash", "-c", script], env=self.environ, cwd=ROOT, capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        if re.match(r"(?:export )?[A-Z]+=", command):
            self._assignments.append(command)
        return done.stdout

    def see(self, step: Step, command: str | None = None) -> str:
        """Run a step until what is shown comes out: records are delivered within moments, not at once."""
        deadline = time.monotonic() + 20
        while True:
            output = self.run(command or step.command)
            absent = missing(step.shown, output)
            if absent is None:
                return output
            repeats = step.command.startswith(("ibexctl trace", "ibexctl session"))
            if not repeats or time.monotonic() > deadline:
                pytest.fail(f"{step.command}\nlacks {absent}\nin\n{output}")


def start_as_shown(visitor: Visitor, step: Step, log: Path) -> subprocess.Popen[bytes]:
    """What `make run` starts, on a free port, until it has printed what the README shows."""
    made = subprocess.run(["make", "-n", "run"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search(r"^exec \S+/ibexctl serve$", made, re.MULTILINE), made
    with log.open("wb") as output:
        process = subprocess.Popen(
            [PROGRAMS / "ibexctl", "serve", "--port", "0"],
            env=visitor.environ, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    shown = [line.replace(SHOWN_ADDRESS, "…") for line in step.shown]
    while missing(shown, log.read_text()) is not None:
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    (visitor.address,) = re.findall(r"serves on http://(\S+)", log.read_text())
    return process


def turn_id(head: str) -> str:
    """The turn a reply's head names."""
    (found,) = re.findall(r"^X-IBEX-Turn-ID: (\S+)\r?$", head, re.MULTILINE | re.IGNORECASE)
    return str(found)


@pytest.mark.timeout(120)
def test_the_tour_shows_what_the_readme_says(data_dir: Path, tmp_path: Path, open_house: Callable[..., House]) -> None:
    start, path, agent, directive, ask, traces, trace, pids, kill, again, session = read_tour()
    visitor = Visitor(data_dir)
    process = start_as_shown(visitor, start, tmp_path / "log")
    try:
        for step in (path, agent, directive):
            visitor.see(step)
        turns = [turn_id(visitor.see(ask))]
        streamed = visitor.run(ask.command.replace('"messages"', '"stream": true, "messages"'))
        assert streamed.rstrip().endswith("data: [DONE]")
        turns.append(turn_id(streamed))
        visitor.see(traces)
        visitor.see(trace, re.sub(r"\S+$", turns[1], trace.command))
        visitor.see(pids)
        _, _, kill_all = kill.command.partition(" && ")
        assert "exactly: survive" in kill.command
        survivor = visitor.run(f"{ask.command.replace('exactly: hello', 'exactly: survive')} && {kill_all}")
        turns.append(turn_id(survivor))
        assert process.wait(10) == -9
    finally:
        process.terminate()
        process.wait(30)

    assert again.command == start.command
    open_house(data_dir)
    rows = visitor.see(session).splitlines()[-3:]
    assert [row.split()[-1] for row in rows] == turns


def test_the_snippet_for_an_sdk_makes_a_client_that_works(house: House) -> None:
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", section("With an SDK"), re.MULTILINE | re.DOTALL)
    call = """
message = {"role": "user", "content": "Reply with exactly: hello"}
print(client.chat.completions.create(model="gpt-4o-mini", messages=[message]).choices[0].message.content)
"""
    code = snippet.replace(f"http://{SHOWN_ADDRESS}", house.url) + call
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)

    assert (done.returncode, done.stdout) == (0, "hello\n"), done.stderr
