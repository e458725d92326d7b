"""The guard of the security matrix: every row of it has a test, and no test claims a row that there is not."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.security.test_matrix import ROWS as TABLE

ROWS = {
    "1.1": "no Authorization",
    "1.2": "empty bearer",
    "1.3": "malformed",
    "1.4": "unknown",
    "1.5": "revoked, refused on every node",
    "1.6": "expired",
    "1.7": "valid passes",
    "2.1": "no agent header",
    "2.2": "not a UUID",
    "2.3": "unknown agent",
    "2.4": "other organization's agent",
    "2.5": "paused",
    "2.6": "archived",
    "2.7": "active passes",
    "2.8": "identity store away: 503 for the unknown",
    "3.1": "A and A pass",
    "3.2": "A's token, B's agent",
    "3.3": "B's token, A's agent",
    "3.4": "time of 3.2 and 3.3",
    "3.5": "path organization differs",
    "4.1": "Remaining decrements",
    "4.2": "61st of 60",
    "4.3": "Retry-After 1 to 60",
    "4.4": "Reset at most 61 s ahead",
    "4.5": "A exhausted, B served",
    "4.6": "Redis away",
    "5.1": "no permissions",
    "5.2": "read-only on a write route",
    "5.3": "full passes",
    "6.1": "every error is JSON",
    "6.2": "every error has the schema",
    "6.3": "request_id is the header's",
    "6.4": "the header is present",
    "6.5": "no credential in any body",
    "7.1": "oversized",
    "7.2": "warm cache, then revoked",
    "7.3": "without Redis a revocation holds within 5 s",
    "7.4": "token bound to another agent",
    "7.5": "suspended organization",
    "7.6": "suspended user",
    "7.7": "hostile bearers",
    "7.8": "Host and X-Forwarded-* change nothing",
}
"""The security matrix, section 15 of the contract."""

NUMBERED = re.compile(r"test_(\d_\d(?:_(?:and|to)_\d_\d)*)_")
"""A test names its rows: `test_4_1_to_4_5_…`, `test_1_5_and_7_2_…`."""

ON_EVERY_NODE = {
    "1.5": "test_every_worker_follows_whom_the_command_line_stops",
    "7.3": "test_a_revocation_holds_within_five_seconds_whatever_happens_to_redis",
}
"""Rows that one worker alone does not prove, and their tests on two nodes of two."""


def names_of_tests() -> Iterator[str]:
    """The names of all tests beside this one."""
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                yield node.name


def rows_named(name: str) -> set[str]:
    """The rows that a test's name claims."""
    match = NUMBERED.match(name)
    if match is None:
        return set()
    first, *rest = re.findall(r"(?:(and|to)_)?(\d)_(\d)", match[1])
    rows = {f"{first[1]}.{first[2]}"}
    last = first
    for word, group, number in rest:
        start = int(last[2]) if word == "to" else int(number)
        assert word != "to" or group == last[1], name
        rows |= {f"{group}.{each}" for each in range(start, int(number) + 1)}
        last = (word, group, number)
    return rows


def test_every_row_has_a_test_and_every_test_a_row() -> None:
    tested = {row.number for row in TABLE}.union(*map(rows_named, names_of_tests()))
    assert sorted(ROWS.keys() - tested) == []
    assert sorted(tested - ROWS.keys()) == []


def test_what_one_worker_does_not_prove_has_a_test_on_two_nodes() -> None:
    assert set(ON_EVERY_NODE.values()) <= set(names_of_tests())
