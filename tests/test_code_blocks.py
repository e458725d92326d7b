"""Every command the documents show exists as it is shown, and is run by a test or says why not."""

import re
import shlex
from functools import cache

import pytest
import typer
from typer.core import TyperGroup

from ibex.config import Settings, environment_names
from ibexctl.app import app
from ibexctl.command import Invocation
from tests.shown_commands import NOT_RUN, PAGES, ROOT, RUN, Shown, read_blocks, read_commands

SHOWN = [shown for page in PAGES for shown in read_commands(page)]
ROOT_COMMAND = typer.main.get_command(app)
AN_ID = "00000000-0000-0000-0000-000000000003"


def without_what_varies(command: str) -> str:
    return command.replace("$AGENT", AN_ID).replace("…", AN_ID)


def calls(command: str) -> list[list[str]]:
    """The words of each call of `ibexctl` in a command."""
    return [shlex.split(call) for call in re.findall(r"\bibexctl ([^|;&>)\n]+)", without_what_varies(command))]


def parse(words: list[str]) -> None:
    """Parse a call as the program would, and run nothing. Raises TyperException for what it would refuse."""
    command, parent = ROOT_COMMAND, None
    while isinstance(command, TyperGroup):
        context = command.make_context(command.name, list(words), parent=parent, obj=Invocation())
        _, found, words = command.resolve_command(context, [*context._protected_args, *context.args])
        assert found is not None
        command, parent = found, context
    command.make_context(command.name, list(words), parent=parent)


@cache
def code() -> str:
    """Every program and every test."""
    programs = [path for place in ("ibex", "ibexctl", "infra", "tests") for path in (ROOT / place).rglob("*")]
    return "\n".join(path.read_text() for path in programs if path.suffix in {".py", ".sh"})


@pytest.mark.parametrize("page", PAGES)
def test_every_block_names_its_language(page: str) -> None:
    assert [text for language, text in read_blocks(page) if not language] == []


def test_every_command_is_run_by_a_test_or_says_why_not() -> None:
    assert [shown for shown in SHOWN if shown.row is None] == []


def test_the_tables_name_nothing_that_is_not_shown_and_only_tests_that_exist() -> None:
    assert {shown.row for shown in SHOWN} == RUN.keys() | NOT_RUN.keys()
    assert [test for test in set(RUN.values()) if not (ROOT / test).is_file()] == []


@pytest.mark.parametrize(
    "shown", [shown for shown in SHOWN if "ibexctl " in shown.command], ids=lambda shown: shown.command
)
def test_a_call_of_ibexctl_is_understood(shown: Shown) -> None:
    for words in calls(shown.command):
        parse(words)


@pytest.mark.parametrize("words", [["org", "limits"], ["org", "limit", "acme", "--rmp", "6"], ["org", "show"]])
def test_a_call_that_is_wrong_would_be_noticed(words: list[str]) -> None:
    with pytest.raises(typer.TyperException):
        parse(words)


@pytest.mark.parametrize("page", PAGES)
def test_a_call_of_ibexctl_in_the_text_names_a_command_that_exists(page: str) -> None:
    for call in re.findall(r"`ibexctl ([^`]+)`", (ROOT / page).read_text()):
        command, words = ROOT_COMMAND, call.split()
        while isinstance(command, TyperGroup) and words and re.fullmatch("[a-z-]+", words[0]):
            if words[0].startswith("-"):
                break
            assert words[0] in command.commands, call
            command = command.commands[words.pop(0)]
        parameters = (*ROOT_COMMAND.params, *command.params)
        options = {name for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts)}
        for option in re.findall(r"(?<!\S)\[?(--[a-z-]+)", " ".join(words)):
            assert option in options | {"--help"}, call


@pytest.mark.parametrize("page", PAGES)
def test_targets_and_files_of_the_blocks_exist(page: str) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))

    for shown in read_commands(page):
        assert set(re.findall(r"\bmake ([a-z0-9-]+)", shown.command)) <= targets
        files = re.findall(r"(?<![\w/.])(?:ibex|infra|docs|tests|loadtests)/[\w./-]+", shown.command)
        assert [file for file in files if not (ROOT / file).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_environment_name_is_a_setting_or_read_by_some_script(page: str) -> None:
    settings = {name for field in Settings.model_fields for name in environment_names(field)}
    named = set(re.findall(r"\bIBEX_[A-Z_]*[A-Z]\b", (ROOT / page).read_text()))

    strangers = {name for name in named if not {name, name.removesuffix("_FILE")} & settings}
    assert [name for name in strangers if not re.search(rf"\b{name}\b", code())] == []
