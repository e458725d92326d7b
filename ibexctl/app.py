"""The program `ibexctl`: its commands, and the one place where an error becomes a message and an exit code."""

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from ibex.errors import IbexError, OperatorError, StoreRefused, StoreUnavailable
from ibexctl import (
    audit,
    directives,
    identity,
    journal,
    migrate,
    org_data,
    reconcile,
    recorder,
    reload,
    serve,
    sessions,
    settings,
    smoke,
    status,
    tokens,
    trace_stats,
    traces,
)
from ibexctl.bench import command as bench
from ibexctl.command import Invocation, JsonFlag, command, invocation_of
from ibexctl.demo import command as demo
from ibexctl.help import Program
from ibexctl.output import Answer, OutputFailed, show, show_error
from ibexctl.top import command as top

DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130

_ENDING = """\
\b
Every command has --help with examples, and --json for programs.
Settings are read from the environment, else from .env: `ibexctl config show`.

\b
Exit codes:
  0    done
  1    failed: the message says why, and a hint what to do
  2    wrong usage
  130  interrupted

\b
Example:
  ibexctl serve                            # a node with stores of its own
  ibexctl smoke                            # is it whole?
  ibexctl org create acme                  # a tenant …
  ibexctl agent register bot --org acme    # … an agent of it …
  ibexctl token mint --org acme            # … and what it presents"""

app = typer.Typer(
    name="ibexctl",
    cls=Program,
    epilog=_ENDING,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's help takes 0.2 s longer to import than all the rest
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(ctx: typer.Context, is_wanted: bool) -> None:
    if is_wanted:
        show(_version(), is_json=invocation_of(ctx).is_json)
        raise typer.Exit


@app.callback()
def root(
    ctx: typer.Context,
    is_json: JsonFlag = False,
    _: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Run ibex and tend it: the server, its tenants, their directives, and the record of every turn."""
    invocation_of(ctx).is_json |= is_json


def _version() -> Answer:
    from platform import python_version

    from ibex import __version__

    return Answer({"version": __version__, "python": python_version()}, (f"ibex {__version__}",))


@command(app, "version", example="ibexctl version")
def version() -> Answer:
    """Print the version of ibex."""
    return _version()


serve.register(app)
status.register(app)
top.register(app)
recorder.register(app)
reload.register(app)
reconcile.register(app)
smoke.register(app)
bench.register(app)
app.add_typer(demo.app, name="demo")
app.add_typer(settings.app, name="config")
app.add_typer(migrate.app, name="migrate")
org_data.register(identity.organizations)
app.add_typer(identity.organizations, name="org")
app.add_typer(identity.users, name="user")
app.add_typer(identity.agents, name="agent")
app.add_typer(tokens.app, name="token")
app.add_typer(directives.app, name="directive")
app.add_typer(sessions.app, name="session")
app.add_typer(audit.app, name="audit")
trace_stats.register(traces.app)
app.add_typer(traces.app, name="trace")
app.add_typer(journal.app, name="journal")


def main() -> NoReturn:
    """Run the command in the program's arguments and end the process with its exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the caller closed it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115 - for as long as the process lives
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError:
        _silence_stdout()
        code = code or FAILED
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 wrong usage."""
    invocation = Invocation(is_json=_asks_for_json(arguments))
    try:
        return int(app(args=list(arguments), prog_name="ibexctl", obj=invocation, standalone_mode=False) or DONE)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _silence_stdout()
        return FAILED
    except OutputFailed as error:
        return _report_output(error)
    except Exception as error:  # noqa: BLE001  # the last stop: a person gets a message, never a traceback unasked
        try:
            return _report(error, is_json=invocation.is_json)
        except OutputFailed as failure:
            return _report_output(failure)


def _asks_for_json(arguments: Sequence[str]) -> bool:
    """Known before parsing, so that wrong usage is told in JSON too."""
    before_end = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return "--json" in before_end


def _report(error: Exception, *, is_json: bool) -> int:
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, typer.TyperException):
        return _report_usage(error, is_json=is_json)
    if isinstance(error, typer.Abort):
        show_error("Aborted.", None, is_json=is_json)
        return FAILED
    if isinstance(error, IbexError):
        show_error(error.message, _hint(error), is_json=is_json)
        return FAILED
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        show_error(f"{place}{error.strerror}.", _OS_HINTS.get(error.errno or 0), is_json=is_json)
    else:
        show_error(
            f"Something unforeseen happened: {type(error).__name__} at {_place_of(error)}.",
            "IBEX_LOG_LEVEL=debug shows the traceback; please report it.",
            is_json=is_json,
        )
    if _is_debugging():
        import traceback

        traceback.print_exception(error, file=sys.stderr)
    return FAILED


def _place_of(error: Exception) -> str:
    """Where it was raised. Its text is not shown: a driver's message can quote what it was given, secrets included."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return (
        f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace is not None else "an unknown place"
    )


def _report_output(error: OutputFailed) -> int:
    _silence_stdout()
    show_error(error.message, error.hint, is_json=False)
    return FAILED


def _report_usage(error: typer.TyperException, *, is_json: bool) -> int:
    message = error.format_message()
    ctx: typer.Context | None = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":  # typer keeps the class to itself; its message is the help
        sys.stdout.write(message + "\n")
        return error.exit_code
    path = ctx.command_path if ctx is not None else "ibexctl"
    show_error(message, f"See `{path} --help`.", is_json=is_json)
    return error.exit_code


_OS_HINTS = {
    errno.EACCES: "Run as the user who owns it, or choose another IBEX_DATA_DIR.",
    errno.EPERM: "Run as the user who owns it, or choose another IBEX_DATA_DIR.",
    errno.EROFS: "Choose an IBEX_DATA_DIR on a disk that can be written.",
    errno.ENOSPC: "Free some space on that disk, or choose another IBEX_DATA_DIR.",
    errno.EADDRINUSE: "Something else listens there; choose another port with --port.",
}


def _hint(error: IbexError) -> str | None:
    if isinstance(error, OperatorError):
        return error.hint
    if isinstance(error, StoreUnavailable | StoreRefused):
        setting = next((name for store, name in _DSNS.items() if store in error.message), "its DSN")
        more = "`ibexctl config check` tries every store."
        if isinstance(error, StoreRefused):
            more = "`ibexctl migrate status` shows whether its schema is current."
        return f"Check that it runs, and that {setting} is right; {more}"
    return None


_DSNS = {
    "Postgres": "IBEX_POSTGRES_ADMIN_DSN (IBEX_POSTGRES_DSN for `serve`)",
    "ClickHouse": "IBEX_CLICKHOUSE_DSN",
    "Redis": "IBEX_REDIS_URL",
}
"""The settings by which commands reach a store that an error's message names."""


def _is_debugging() -> bool:
    from ibex.config import load_settings
    from ibex.errors import ConfigurationError

    try:
        return load_settings().log_level == "debug"
    except ConfigurationError:
        return False


def _silence_stdout() -> None:
    """The reader of a pipe has left: nothing more is to be said, not even by the interpreter's own flush at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
