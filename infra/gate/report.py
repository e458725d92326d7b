"""How a run of the gate is told: a table for people, an object for programs, a page for the repository."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from ibex import __version__
from ibexctl.bench.processes import describe_machine
from infra.gate.programs import ROOT, git
from infra.gate.proof import Result, Status
from infra.gate.site import Upstream

TITLE = "Milestone 2.6.2 — Phase 2 exit gate"
PREFACE = """\
Written by `make exit-gate`. *Pending* is what was not seen here, or what a person does: it is signed off by nobody, and
it is no failure."""
PAGE = ROOT / "docs/exit-gate.md"


@dataclass(frozen=True, slots=True)
class Circumstances:
    """When, of what and on what the gate was run."""

    date: str
    commit: str
    is_dirty: bool
    version: str
    machine: str
    python: str
    upstream: str


async def look_around(upstream: Upstream) -> Circumstances:
    """The circumstances of a run that begins now; no host's name, no directory."""
    found = describe_machine()
    memory = int(str(found["memory_bytes"])) / (1 << 30)
    return Circumstances(
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        commit=await git("rev-parse", "HEAD"),
        is_dirty=bool(await git("status", "--porcelain", "--", ".", f":!{PAGE.relative_to(ROOT)}")),
        version=__version__,
        machine=f"{found['cpu']}, {found['cores']} cores, {memory:.0f} GiB, {found['system']},"
        f" load {found['load_before']} before the run",
        python=str(found["python"]),
        upstream=upstream.name,
    )


def exit_code(results: Sequence[Result]) -> int:
    """1 when a line failed, or none was proved."""
    return 0 if results and all(result.proof.status is not Status.FAIL for result in results) else 1


def verdict(results: Sequence[Result]) -> str:
    """One line: how many lines stand how."""
    counts = {status: sum(result.proof.status is status for result in results) for status in Status}
    word = "not passed" if exit_code(results) else "passed"
    return f"{word}: {counts[Status.PASS]} pass, {counts[Status.FAIL]} fail, {counts[Status.PENDING]} pending"


def as_data(results: Sequence[Result], circumstances: Circumstances) -> dict[str, Any]:
    """The object of `--json`."""
    lines = [{"area": r.line.area, "line": r.line.title, **asdict(r.proof)} for r in results]
    return {"title": TITLE, "passed": exit_code(results) == 0, **asdict(circumstances), "lines": lines}


def as_page(results: Sequence[Result], circumstances: Circumstances) -> str:
    """docs/exit-gate.md."""
    state = "with changes that are in no commit" if circumstances.is_dirty else "nothing changed beside it"
    facts = {
        "Date": circumstances.date,
        "Commit": f"`{circumstances.commit}`, {state}" if circumstances.commit else "not in a repository",
        "Version": circumstances.version,
        "Machine": circumstances.machine,
        "Python": circumstances.python,
        "OpenAI": circumstances.upstream,
        "Verdict": f"**{verdict(results)}**",
    }
    parts = [
        f"# {TITLE}",
        PREFACE,
        _table(("", ""), facts.items()),
    ]
    for area, group in groupby(results, key=lambda result: result.line.area):
        rows = [(r.line.title, r.proof.how, r.proof.figure, _marked(r.proof.status)) for r in group]
        parts += [f"## {area}", _table(("Line", "How proved", "Figure", "Result"), rows)]
    return "\n\n".join(parts) + "\n"


def as_text(title: str, results: Sequence[Result]) -> str:
    """The table as a terminal shows it."""
    wide = max(len(result.line.title) for result in results)
    lines = []
    for area, group in groupby(results, key=lambda result: result.line.area):
        lines += ["", area]
        for result in group:
            status = result.proof.status.upper()
            lines.append(f"  {status:8}{result.line.title:{wide}}  {result.proof.figure}")
            lines.append(f"  {'':8}{'':{wide}}  by {result.proof.how}")
    return "\n".join([title, *lines, "", verdict(results)])


@dataclass(frozen=True, slots=True)
class Page:
    """What a written page says of the run it tells of."""

    commit: str
    is_dirty: bool
    is_passed: bool


def read_page(path: Path = PAGE) -> Page | None:
    """None: there is no page, or it is none of ours."""
    text = path.read_text() if path.exists() else ""
    found = re.search(r"^\| Commit \| `([0-9a-f]+)`, (.+) \|$", text, flags=re.MULTILINE)
    if not text.startswith(f"# {TITLE}\n") or found is None:
        return None
    return Page(found[1], found[2].startswith("with"), f"| {_marked(Status.FAIL)} |" not in text)


def _marked(status: Status) -> str:
    return f"**{status}**" if status is Status.FAIL else str(status)


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
