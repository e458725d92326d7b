"""Help as good as a manual page: every command says what it does, explains each word, and shows how it is called."""

import re
import shlex
from typing import Any

import pytest
import typer

from ibexctl.app import app, run
from ibexctl.help import SECTIONS
from tests.ibexctl.test_app import leaves

ROOT: Any = typer.main.get_command(app)
LEAVES = leaves()
NAMES = [" ".join(words) for words in LEAVES]


def find(words: list[str]) -> Any:
    command = ROOT
    for word in words:
        command = command.commands[word]
    return command


def families() -> list[list[str]]:
    """The words of every group of commands."""
    return [list(words) for words in sorted({tuple(words[:size]) for words in LEAVES for size in range(1, len(words))})]


def help_of(words: list[str]) -> str:
    """The page that `--help` shows."""
    command = find(words)
    page: str = command.get_help(command.context_class(command, info_name=f"ibexctl {' '.join(words)}"))
    return page


def examples(words: list[str]) -> list[str]:
    """The commands a help shows at its end, comments left out."""
    text = find(words).epilog.partition("Example:\n")[2]
    return [re.sub(r"\s+#.*$", "", line.strip()) for line in text.splitlines() if line.strip()]


def parse(line: str) -> None:
    """Read a command line as the program would, and do nothing; raises what a wrong one raises."""
    program, *words = shlex.split(line.rpartition("| ")[2].partition(" > ")[0])
    assert program == "ibexctl"
    command, ctx = ROOT, None
    while True:
        ctx = command.make_context("ibexctl", words, parent=ctx)
        if not hasattr(command, "commands"):
            return
        _, command, words = command.resolve_command(ctx, [*ctx._protected_args, *ctx.args])


def test_every_command_of_the_program_is_in_one_section() -> None:
    listed = [name for names in SECTIONS.values() for name in names]
    assert sorted(listed) == sorted(ROOT.commands)


def test_the_first_page_shows_each_command_under_its_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    page = capsys.readouterr().out
    places = [page.index(f"\n{title}:\n") for title in SECTIONS]
    assert places == sorted(places)
    assert "..." not in page.partition("Run a node:")[2], "a summary is cut"
    assert "Exit codes:" in page
    for line in examples([]):
        parse(line)


@pytest.mark.parametrize("words", LEAVES, ids=NAMES)
def test_a_command_opens_with_one_sentence_and_explains_every_word(words: list[str]) -> None:
    command = find(words)
    summary = " ".join(command.help.partition("\n\n")[0].split())
    assert summary.endswith((".", "?")), summary
    assert len(summary) <= 150, "longer than a sentence should be"
    unexplained = [parameter.name for parameter in command.params if not getattr(parameter, "help", None)]
    assert unexplained in ([], ["help"])


@pytest.mark.parametrize("words", families(), ids=" ".join)
def test_a_family_says_what_it_is_about(words: list[str]) -> None:
    assert find(list(words)).help.strip().endswith(".")


@pytest.mark.parametrize("words", LEAVES, ids=NAMES)
def test_every_example_parses_and_is_of_its_command(words: list[str]) -> None:
    lines = examples(words)
    assert lines
    assert any(f"ibexctl {' '.join(words)}" in line for line in lines)
    for line in lines:
        parse(line)


@pytest.mark.parametrize("words", LEAVES, ids=NAMES)
def test_it_fits_80_columns_and_ends_with_the_example(words: list[str]) -> None:
    page = help_of(words)
    assert "--json" in page
    told, _, shown = page.partition("Example:\n")
    assert shown.split() == find(words).epilog.partition("Example:\n")[2].split()
    assert max(map(len, told.splitlines())) <= 80


def test_exit_codes_are_told_where_they_say_more_than_that_it_worked() -> None:
    for words in (["reconcile"], ["smoke"], ["config", "check"], ["demo", "crash"], ["journal", "deliver"], ["top"]):
        assert re.search(r"Exit codes:\n {4}0  \S.*\n {4}1  \S", help_of(words)), words
