"""`ibexctl reload`: a running server reads its settings anew and replaces its processes, refusing nobody meanwhile."""

import typer

from ibexctl.command import command
from ibexctl.operation import read_settings
from ibexctl.output import Answer


def register(app: typer.Typer) -> None:
    """Add the command."""
    exits = {0: "every process has a successor", 1: "it was refused, or one did not start: the old ones go on"}
    command(app, "reload", example="ibexctl reload", exits=exits)(reload)


def reload() -> Answer:
    """Have the running server read its settings anew and replace its workers and its recorder, one by one.

    No request fails and no connection is closed. The server reads its own environment and its settings file; when
    those are wrong, or a new process does not start, the old ones go on and the command fails.
    """
    settings = read_settings()

    from ibex.server.supervision.status import request_reload

    result = request_reload(settings)
    replaced = ", ".join(result.replaced)
    notes = [f"{name} changed, and needs a full restart." for name in result.ignored_settings]
    data = {
        "replaced": result.replaced,
        "ignored_settings": result.ignored_settings,
        "seconds": round(result.seconds, 3),
    }
    return Answer(data, (f"Replaced {replaced} in {result.seconds:.1f} s.",), notes)
