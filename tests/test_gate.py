"""The exit gate's own logic: a line that fails fails the gate, whatever happens to it, and the page says all of it."""

import asyncio
import re
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from infra.gate import documents, running
from infra.gate.__main__ import choose, read_arguments
from infra.gate.checklist import make_checklist
from infra.gate.proof import HouseLine, LoneLine, Proof, Result, Status, judge
from infra.gate.release import judge_page, tell_next
from infra.gate.report import (
    PAGE,
    TITLE,
    Circumstances,
    Page,
    as_data,
    as_page,
    as_text,
    exit_code,
    look_around,
    read_page,
    verdict,
)
from infra.gate.running import run, without_places
from infra.gate.site import Site, Upstream
from infra.gate.versions import agree, judge_changelog

ROOT = Path(__file__).resolve().parents[1]
PASS, FAIL, PENDING = (Proof(status, f"how {status}", f"figure {status}") for status in Status)
WHEN_AND_WHERE = Circumstances(
    "2026-11-24 09:00 UTC", "0123abcd" * 5, False, "0.2.0", "a machine", "3.11.7", "the ibex sandbox, a stand-in"
)


def line(proof: Proof, area: str = "Security", title: str = "") -> LoneLine:
    async def prove() -> Proof:
        return proof

    return LoneLine(area, title or f"line {proof.status}", prove)


def failing(prove: Callable[[], Awaitable[Proof]]) -> LoneLine:
    return LoneLine("Operations", "goes wrong", prove)


def results(*proofs: Proof) -> list[Result]:
    return [Result(line(proof), proof) for proof in proofs]


@asynccontextmanager
async def no_house() -> AsyncIterator[Site]:
    raise OSError("no room for a house")
    yield


async def prove_all(*lines: HouseLine | LoneLine) -> tuple[list[Result], list[str]]:
    said: list[str] = []
    return await run(lines, no_house, said.append), said


@pytest.mark.parametrize(
    ("proofs", "code"),
    [((PASS,), 0), ((PASS, PENDING), 0), ((PASS, FAIL, PENDING), 1), ((FAIL,), 1), ((), 1)],
    ids=["pass", "pending", "one fails", "all fail", "nothing proved"],
)
def test_one_line_that_fails_fails_the_gate_and_one_that_is_pending_does_not(
    proofs: tuple[Proof, ...], code: int
) -> None:
    assert exit_code(results(*proofs)) == code
    assert as_data(results(*proofs), WHEN_AND_WHERE)["passed"] is (code == 0)
    assert verdict(results(*proofs)).startswith("passed" if code == 0 else "not passed")


async def test_what_is_raised_or_takes_too_long_is_a_failure_of_its_line_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def raise_() -> Proof:
        raise ValueError("the figure is missing")

    async def hang() -> Proof:
        await asyncio.sleep(60)
        return PASS

    monkeypatch.setattr(running, "LINE_SECONDS", 0.05)
    found, said = await prove_all(failing(raise_), failing(hang), line(PASS))

    assert [result.proof.status for result in found] == [Status.FAIL, Status.FAIL, Status.PASS]
    assert [result.proof.figure for result in found[:2]] == ["the figure is missing", "took too long"]
    assert [words.split()[0] for words in said] == ["FAIL", "FAIL", "PASS"]


async def test_a_house_that_does_not_stand_fails_its_lines_and_the_others_are_proved() -> None:
    async def prove(_: Site) -> Proof:
        return PASS

    found, _ = await prove_all(HouseLine("Functionality", "asks the house", prove), line(PASS))

    assert [(result.proof.status, result.proof.figure) for result in found] == [
        (Status.FAIL, "no room for a house"),
        (Status.PASS, PASS.figure),
    ]


def test_the_page_has_the_heading_the_circumstances_and_every_line(tmp_path: Path) -> None:
    page = as_page([*results(PASS, FAIL), Result(line(PENDING, "Release", "tag | v1"), PENDING)], WHEN_AND_WHERE)

    assert page.splitlines()[0] == f"# {TITLE}" == "# Milestone 2.6.2 — Phase 2 exit gate"
    for fact in (WHEN_AND_WHERE.date, WHEN_AND_WHERE.commit, "a machine", "3.11.7", "the ibex sandbox, a stand-in"):
        assert fact in page
    assert re.findall(r"^## (.+)$", page, flags=re.MULTILINE) == ["Security", "Release"]
    assert "| line fail | how fail | figure fail | **fail** |" in page
    assert "| tag \\| v1 | how pending | figure pending | pending |" in page
    assert "not passed: 1 pass, 1 fail, 1 pending" in page


@pytest.mark.parametrize("is_dirty", [False, True])
@pytest.mark.parametrize("proof", [PASS, FAIL], ids=["passed", "failed"])
def test_a_page_can_be_read_again(tmp_path: Path, proof: Proof, is_dirty: bool) -> None:
    circumstances = Circumstances(**{**as_circumstances(), "is_dirty": is_dirty})
    path = tmp_path / "page.md"
    path.write_text(as_page(results(proof, PENDING), circumstances))
    page = read_page(path)

    assert page is not None
    assert (page.commit, page.is_dirty) == (WHEN_AND_WHERE.commit, is_dirty)
    assert page.is_passed is (proof is PASS)
    assert read_page(tmp_path / "none.md") is None
    path.write_text("# Something else\n")
    assert read_page(path) is None


def as_circumstances() -> dict[str, object]:
    return {name: getattr(WHEN_AND_WHERE, name) for name in Circumstances.__dataclass_fields__}


def test_the_table_names_every_line_with_its_figure() -> None:
    text = as_text(TITLE, results(PASS, FAIL, PENDING))

    assert [row.split()[0] for row in text.splitlines() if "figure" in row] == ["PASS", "FAIL", "PENDING"]
    assert text.splitlines()[-1] == "not passed: 1 pass, 1 fail, 1 pending"


@pytest.mark.parametrize("place", [str(ROOT), str(Path.home()), tempfile.gettempdir()])
def test_no_directory_of_this_machine_reaches_the_page(place: str) -> None:
    assert without_places(f"cannot read {place}/some/file:\n gone") == "cannot read …: gone"


async def test_the_circumstances_tell_the_machine_but_not_its_name() -> None:
    found = await look_around(Upstream(is_openai=False))

    assert re.search(r"\d+ cores, \d+ GiB", found.machine)
    assert "stand-in" in found.upstream
    assert str(ROOT) not in str(found)


def test_a_bar_is_met_or_not() -> None:
    assert judge(True, "how", "figure").status is Status.PASS
    assert judge(False, "how", "figure").status is Status.FAIL


def test_the_checklist_has_every_line_once_and_areas_together() -> None:
    lines = make_checklist()
    areas = [line.area for line in lines]

    assert len({line.title for line in lines}) == len(lines)
    assert list(dict.fromkeys(areas)) == sorted(set(areas), key=areas.index)
    assert sorted(areas, key=list(dict.fromkeys(areas)).index) == areas
    house = [line.title for line in lines if isinstance(line, HouseLine)]
    assert house[-1] == "Shutdown drains without drops", "it ends the house"


def test_a_part_of_the_checklist_writes_no_page() -> None:
    assert read_arguments([]).write == PAGE
    assert read_arguments(["--only", "tag"]).write is None
    assert [line.title for line in choose(make_checklist(), ["v0.2.0"])] == ["Tag v0.2.0"]
    assert choose(make_checklist(), []) != []


DATED = "# Changelog\n\n## [Unreleased]\n\n## [0.2.0] - 2026-11-24\n\n- new\n\n## [0.1.0] - 2026-01-01\n"


@pytest.mark.parametrize(
    ("text", "figure"),
    [
        (DATED, "[0.2.0] - 2026-11-24"),
        (DATED.replace("## [Unreleased]\n\n", ""), "[0.2.0] - 2026-11-24"),
        (DATED.replace("]\n\n## [0.2", "]\n\n- late\n\n## [0.2"), "`[Unreleased]` still holds lines"),
        (DATED.replace(" - 2026-11-24", ""), "the entry of 0.2.0 has no date"),
        (DATED.replace("2026-11-24", "soon"), "the entry of 0.2.0 has no date"),
        (DATED.replace("0.2.0", "0.3.0"), "0.2.0 has no dated entry: the newest entry is 0.3.0's"),
        ("## [Unreleased]\n\n- all of it\n", "0.2.0 has no dated entry: there is no released entry"),
    ],
)
def test_a_release_needs_a_dated_entry_of_its_own(text: str, figure: str) -> None:
    proof = judge_changelog(text, "0.2.0")

    assert proof.figure == figure
    assert proof.status is (Status.PASS if figure.startswith("[0.2.0]") else Status.FAIL)


@pytest.mark.parametrize(
    ("page", "changed", "status"),
    [
        (Page("0123", is_dirty=False, is_passed=True), [], Status.PASS),
        (Page("0123", is_dirty=True, is_passed=True), [], Status.FAIL),
        (Page("0123", is_dirty=False, is_passed=False), [], Status.FAIL),
        (Page("0123", is_dirty=False, is_passed=True), ["ibex/errors.py"], Status.FAIL),
        (None, [], Status.FAIL),
    ],
    ids=["green", "dirty", "a line failed", "another tree", "no page"],
)
def test_a_release_needs_a_green_gate_of_this_very_tree(page: Page | None, changed: list[str], status: Status) -> None:
    assert judge_page(page, changed).status is status


def test_the_commands_of_a_release_are_told_only_when_nothing_stands_against_it() -> None:
    assert tell_next(results(PASS, PENDING), "0.2.0").splitlines()[-2:] == [
        '  git tag -s v0.2.0 -m "ibex 0.2.0"',
        "  git push origin v0.2.0",
    ]
    assert "git" not in tell_next(results(PASS, FAIL), "0.2.0")


async def test_every_place_names_the_same_version() -> None:
    proof = await agree()

    assert proof.status is Status.PASS, proof.figure


@pytest.mark.parametrize(
    "prove",
    [documents.current_state, documents.development_guide, documents.decisions, documents.env_example],
    ids=lambda prove: prove.__name__,
)
async def test_the_documents_that_the_gate_asks_for_are_there(prove: Callable[[], Awaitable[Proof]]) -> None:
    proof = await prove()

    assert proof.status is Status.PASS, proof.figure
