"""`ibexctl status`: the process tree of the server that runs on this data directory, and how each part of it is."""

import typer

from ibexctl.command import command
from ibexctl.operation import read_settings
from ibexctl.output import Answer, Fields, Table

_COLUMNS = ("process", "pid", "up", "uptime", "restarts", "memory", "facts")


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "status", example="ibexctl status")(status)


def status() -> Answer:
    """Show the running server and its processes.

    Fails when none runs on this data directory.
    """
    settings = read_settings()

    from ibex.server.status import request_status

    node = request_status(settings)
    facts = {
        "version": node.version,
        "env": node.env,
        "url": node.url,
        "metrics_url": node.metrics_url,
        "data_dir": node.data_dir,
        "upstream": f"{node.upstream} ({node.llm_mode})",
        "started_at": node.started_at,
        "uptime": format_span(node.uptime_seconds),
    }
    rows = [
        (
            process.name,
            process.pid,
            process.is_up,
            format_span(process.uptime_seconds),
            process.restarts,
            format_bytes(process.memory_bytes),
            process.facts,
        )
        for process in node.processes
    ]
    is_whole = all(process.is_up for process in node.processes)
    notes = () if is_whole else ("A process is down: the server starts it again; its log says why it fell.",)
    return Answer(node.as_dict(), (Fields(facts), "", Table(_COLUMNS, rows)), notes)


def format_span(seconds: float | None) -> str:
    """A span in its two largest units: `3 d 4 h`, `5 min 6 s`."""
    if seconds is None:
        return ""
    rest = int(seconds)
    parts: list[str] = []
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, size)
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def format_bytes(size: int | None) -> str:
    """A size in MiB."""
    return "" if size is None else f"{size / (1 << 20):,.0f} MiB"
