"""The commands that the documents show, and who runs each: a test, or nobody, for a reason that stands here."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md"))]
LANGUAGES_OF_COMMANDS = {"console", "sh", "bash"}

OWN_SERVERS = "needs servers of one's own and their superuser"
OTHER_PROGRAM = "needs another program, installed from a network"
CONTAINERS = "needs a container engine; the page says how the image was tried"
MACHINE = "changes the machine it runs on; the page says how the units were tried"
CLUSTER = "needs a cluster; the page says how the chart was tried"
MINUTES = "takes minutes and a quiet machine; tests/ibexctl/test_bench.py runs the scenarios for seconds"

CLI_PAGE = "tests/acceptance/test_cli_page.py"

RUN: dict[tuple[str, str], str] = {
    ("README.md", "make run"): "tests/acceptance/test_tour.py",
    ("README.md", "export PATH="): "tests/acceptance/test_tour.py",
    ("README.md", "AGENT="): "tests/acceptance/test_tour.py",
    ("README.md", "PIDS="): "tests/acceptance/test_tour.py",
    ("README.md", "curl "): "tests/acceptance/test_tour.py",
    ("README.md", "ibexctl "): "tests/acceptance/test_tour.py",
    ("README.md", "ibexctl demo"): "tests/ibexctl/demo/test_demonstrations.py",
    ("docs/DEVELOPMENT_GUIDE.md", "make run"): "tests/acceptance/test_tour.py",
    ("docs/DEVELOPMENT_GUIDE.md", "ibexctl serve"): "tests/acceptance/test_tour.py",
    ("docs/DEVELOPMENT_GUIDE.md", "ibexctl config check"): CLI_PAGE,
    ("docs/DEVELOPMENT_GUIDE.md", "ibexctl migrate up --seed"): CLI_PAGE,
    ("docs/cli.md", "ibexctl "): CLI_PAGE,
    ("docs/cli.md", "ibexctl serve"): "tests/acceptance/test_tour.py",
    ("docs/cli.md", "ibexctl demo"): "tests/ibexctl/demo/test_demonstrations.py",
    ("docs/cli.md", "ibexctl token mint --as-token"): "tests/ibexctl/test_minting_by_token.py",
    ("docs/observability.md", "ibexctl top"): "tests/acceptance/test_top.py",
    ("docs/observability.md", "ibexctl trace stats"): "tests/ibexctl/test_records.py",
    ("docs/cli.md", "ibexctl recorder"): "tests/server/test_lone_recorder.py",
    ("docs/cli.md", "ibexctl top"): "tests/acceptance/test_top.py",
    ("docs/cli.md", "ibexctl smoke --self-contained"): "tests/ibexctl/test_serve.py",
    ("docs/cli.md", "ibexctl migrate down"): "tests/ibexctl/test_migrate.py",
    ("docs/cli.md", "ibexctl org erase"): "tests/ibexctl/test_org_data.py",
    ("docs/cli.md", "ibexctl journal deliver"): "tests/ibexctl/test_journal.py",
    ("docs/cli.md", "ibexctl journal dead-letters replay 3 4"): "tests/ibexctl/test_journal.py",
    ("docs/clients.md", "curl "): "tests/acceptance/test_clients_page.py",
    ("docs/operations.md", "ibexctl migrate up"): CLI_PAGE,
    ("docs/operations.md", "ibexctl migrate status"): CLI_PAGE,
}
"""Page and beginning of the command, and the test that runs it. The longest beginning holds."""

NOT_RUN: dict[tuple[str, str], str] = {
    ("README.md", "make test"): "it is what runs the tests",
    ("docs/DEVELOPMENT_GUIDE.md", "make test"): "it is what runs the tests",
    ("docs/DEVELOPMENT_GUIDE.md", "psql "): OWN_SERVERS,
    ("docs/DEVELOPMENT_GUIDE.md", "export IBEX_"): OWN_SERVERS,
    ("docs/cli.md", "ibexctl bench"): MINUTES,
    ("docs/cli.md", "git show HEAD:directive.txt"): "needs a repository that holds the directive",
    ("docs/observability.md", "curl "): OTHER_PROGRAM,
    ("docs/observability.md", "export OTEL_"): OTHER_PROGRAM,
    ("docs/deployment.md", "docker "): CONTAINERS,
    ("docs/deployment.md", "python3.11 -m venv /opt/ibex"): MACHINE,
    ("docs/deployment.md", "/opt/ibex/bin/pip"): MACHINE,
    ("docs/deployment.md", "cp infra/systemd/"): MACHINE,
    ("docs/deployment.md", "install "): MACHINE,
    ("docs/deployment.md", "systemd-sysusers"): MACHINE,
    ("docs/deployment.md", "systemctl "): MACHINE,
    ("docs/deployment.md", "helm "): CLUSTER,
    ("docs/deployment.md", "kubectl "): CLUSTER,
    ("docs/operations.md", "psql "): OWN_SERVERS,
    ("docs/operations.md", "pg_dump "): OWN_SERVERS,
    ("docs/operations.md", "pg_restore "): OWN_SERVERS,
    ("docs/performance.md", "ibexctl bench"): MINUTES,
    ("docs/performance.md", "pip install py-spy"): OTHER_PROGRAM,
    ("docs/performance.md", "py-spy "): OTHER_PROGRAM,
    ("docs/upstreams.md", "OPENAI_BASE_URL="): OTHER_PROGRAM,
}
"""The same, with the reason why no test runs it as it is shown."""


@dataclass(frozen=True)
class Shown:
    """One command of a page."""

    page: str
    command: str

    @property
    def row(self) -> tuple[str, str] | None:
        """Its row in one of the tables."""
        rows = [row for row in (*RUN, *NOT_RUN) if row[0] == self.page and self.command.startswith(row[1])]
        return max(rows, key=lambda row: len(row[1]), default=None)


def read_blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def read_commands(page: str) -> list[Shown]:
    """Every command of a page's blocks: behind the prompts where there are prompts, else each line."""
    found = list[Shown]()
    for language, text in read_blocks(page):
        if language not in LANGUAGES_OF_COMMANDS:
            continue
        whole = re.sub(r"\\\n\s*", "", text)
        commands = re.findall(r"^\$ (.+)$", whole, re.MULTILINE) or [line for line in whole.splitlines() if line]
        found += [Shown(page, re.sub(r"\s+# .*$", "", command)) for command in commands]
    return found
