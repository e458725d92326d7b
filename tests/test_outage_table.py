"""The table of outages in docs/operations.md: each row names tests that there are, and nothing is left out of it."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COLUMNS = ["What is away", "What happens", "What you see", "What to do", "Test"]
SUBJECTS = (
    "Postgres is down", "Postgres hangs", "Postgres for longer", "Redis is down or hangs", "Redis was flushed",
    "ClickHouse is down or hangs", "Postgres and Redis", "provider is down", "provider is slow", "provider cuts",
    "near a bound", "disk is full", "worker dies", "recorder dies", "supervisor dies", "machine is lost", "clock",
    "segment is damaged",
)  # fmt: skip


def read_rows() -> list[list[str]]:
    """The cells of each row."""
    text = (ROOT / "docs/operations.md").read_text()
    lines = text[text.index("| " + " | ".join(COLUMNS) + " |") :].splitlines()
    table = lines[: lines.index("")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[2:]]


@cache
def functions_of(path: str) -> set[str]:
    """The functions that a file defines at its top."""
    body = ast.parse((ROOT / path).read_text()).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


ROWS = read_rows()


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_each_row_names_tests_that_there_are(row: list[str]) -> None:
    assert len(row) == len(COLUMNS)
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", row[-1])
    assert named
    for path, name in named:
        assert name in functions_of(path)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_nothing_is_left_out(subject: str) -> None:
    assert any(subject in row[0] for row in ROWS)


def test_what_the_log_says_is_what_the_table_quotes() -> None:
    source = "".join(path.read_text() for path in (ROOT / "ibex").rglob("*.py"))
    quoted = [
        line
        for row in ROWS
        for said in re.findall(r"log ((?:`[^`]+`(?:, )?)+)", row[2])
        for line in said.split("`")[1::2]
    ]
    assert len(quoted) > 10
    assert [line for line in quoted if f'"{line}' not in source] == []
