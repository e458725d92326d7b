"""The snippets of docs/clients.md, run as they stand, but for the address and the session."""

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from tests.acceptance.conftest import House

PAGE = Path(__file__).resolve().parents[2] / "docs" / "clients.md"
ADDRESS, SESSION = "http://127.0.0.1:8080", "my-session"
SANDBOX_SAYS = "This is the ibex sandbox, not a model. It read 6 characters."


@dataclass(frozen=True)
class Snippet:
    """What the page shows for one client."""

    language: str
    code: str


def read_snippets() -> dict[str, Snippet]:
    """The first snippet under each heading of the page."""
    found = re.findall(
        r"^## ([^\n]+)\n(?:(?!^## ).)*?^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL
    )
    return {heading: Snippet(language, code) for heading, language, code in found}


def run_snippet(snippet: Snippet, house: House, cwd: Path) -> None:
    """Run it in a process of its own: it must print the sandbox's answer, and its turn must be in its session."""
    session = f"s-{uuid4()}"
    code = snippet.code.replace(ADDRESS, house.url).replace(SESSION, session)
    program = {
        "bash": ["bash", "-c", code],
        "python": [sys.executable, "-c", code],
        "js": ["node", "--input-type=module", "-e", code],
    }[snippet.language]
    environ = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run(program, cwd=cwd, env=environ, capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr
    assert SANDBOX_SAYS in done.stdout
    deadline = time.monotonic() + 20
    while not house.ctl("trace", "list", "--session", session)["traces"]:
        assert time.monotonic() < deadline, "no turn was recorded in the session"
