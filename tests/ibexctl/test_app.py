"""The program as a whole: help, wrong usage, `--json` anywhere, and never a traceback."""

import json
import subprocess
import sys

import pytest
import typer

from ibex.errors import ConfigurationError, StoreUnavailable
from ibexctl.app import app, run

HEAVY = {"asyncpg", "aiohttp", "clickhouse_connect", "msgspec", "opentelemetry", "prometheus_client", "redis", "rich"}


def leaves() -> list[list[str]]:
    """The words of every command there is."""
    root = typer.main.get_command(app)
    found: list[list[str]] = []

    def walk(command: object, words: list[str]) -> None:
        children = getattr(command, "commands", None)
        if children is None:
            found.append(words)
        for name, child in (children or {}).items():
            walk(child, [*words, name])

    walk(root, [])
    return found


@pytest.mark.parametrize("words", [["--help"], ["org", "--help"], ["serve", "--help"], ["token", "mint", "--help"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    program = (
        "import sys; from ibexctl.app import run; code = run(sys.argv[1:]); "
        "print(*(name for name in sys.modules if '.' not in name), file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=True)
    # typer itself imports pydantic where it reads a command's parameters, but not for the first page
    heavy = HEAVY | {"pydantic", "asyncio"} if words == ["--help"] else HEAVY
    assert not set(done.stderr.split()) & heavy


@pytest.mark.parametrize("words", [["version", "--json"], ["--json", "version"], ["--json", "--version"]])
def test_json_is_taken_before_and_after_the_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words) == 0
    assert json.loads(capsys.readouterr().out).keys() == {"version", "python"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["org", "create"], "Missing argument"),
        (["org", "create", "acme", "--bogus"], "No such option: --bogus"),
        (["org", "creat", "acme"], "Did you mean 'create'?"),
        (["org", "limit", "acme", "--rpm", "0"], "--rpm"),
        (["org", "limit", "acme", "--rpm", "many"], "--rpm"),
        (["session", "show", "chat", "--agent", "bot"], "'bot' is not an id"),
        (["token", "mint", "--org", "acme", "--expires-in", "soon"], "'soon' is not a duration"),
        (["token", "mint", "--org", "acme", "--permissions", "All"], "The sets are ProxyChatCompletion"),
        (["trace", "show", "42"], "'42' is not an id"),
        (["directive", "set", "00000000-0000-0000-0000-000000000003", "--mode", "last", "--text", "x"], "--mode"),
    ],
)
def test_wrong_usage_ends_with_2_and_says_where_to_read(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert "--help`" in captured.err

    assert run([*words, "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.err == ""
    error = json.loads(captured.out)["error"]
    assert message in error["message"]
    assert "--help`" in error["hint"]


def test_a_family_alone_shows_its_commands_and_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["org"]) == 2
    assert "create" in capsys.readouterr().out


@pytest.fixture
def failing_version(monkeypatch: pytest.MonkeyPatch):
    def fail_with(error: BaseException) -> None:
        def fail() -> None:
            raise error

        monkeypatch.setattr("ibexctl.app._version", fail)

    return fail_with


def test_an_operator_error_is_a_message_and_a_hint(failing_version, capsys: pytest.CaptureFixture[str]) -> None:
    failing_version(ConfigurationError("IBEX_PORT: wrong.", hint="Mend it."))
    assert run(["version"]) == 1
    assert capsys.readouterr().err == "error: IBEX_PORT: wrong.\n hint: Mend it.\n"
    assert run(["version", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {"error": {"message": "IBEX_PORT: wrong.", "hint": "Mend it."}}


def test_a_store_that_is_away_is_a_message_too(failing_version, capsys: pytest.CaptureFixture[str]) -> None:
    failing_version(ExceptionGroup("several", [StoreUnavailable("Postgres is not available.")]))
    assert run(["version"]) == 1
    shown = capsys.readouterr().err
    assert "error: Postgres is not available.\n hint: Check that it runs, and that IBEX_POSTGRES_ADMIN_DSN" in shown


def test_an_error_of_the_system_names_the_file(failing_version, capsys: pytest.CaptureFixture[str]) -> None:
    failing_version(PermissionError(13, "Permission denied", "/data"))
    assert run(["version"]) == 1
    assert "error: /data: Permission denied.\n hint: Run as the user" in capsys.readouterr().err


def test_the_unforeseen_is_one_line_and_a_traceback_only_when_asked(
    failing_version, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing_version(ZeroDivisionError("postgres://ibex:secret@db/ibex"))
    assert run(["version"]) == 1
    shown = capsys.readouterr().err
    assert "error: Something unforeseen happened: ZeroDivisionError at test_app.py:" in shown
    assert "secret" not in shown
    assert "IBEX_LOG_LEVEL=debug" in shown
    assert "Traceback" not in shown
    monkeypatch.setenv("IBEX_LOG_LEVEL", "debug")
    assert run(["version"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_ends_with_130(failing_version) -> None:
    failing_version(KeyboardInterrupt())
    assert run(["version"]) == 130


def test_a_reader_that_leaves_ends_the_program_quietly() -> None:
    done = subprocess.run(
        ["bash", "-c", '"$0" -m ibexctl version | true; exit "${PIPESTATUS[0]}"', sys.executable],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in {0, 1}
    assert done.stderr == ""
