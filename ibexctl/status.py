"""`ibexctl status`: the process tree of the server that runs on this data directory, and how each part of it is."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import typer

from ibexctl.command import command
from ibexctl.operation import read_settings
from ibexctl.output import Answer, Fields, Table

if TYPE_CHECKING:
    from ibex.config import Settings
    from ibex.server.supervision.status import NodeStatus, ProcessStatus

_SUMMED_UP = {"pending_turns", "oldest_seconds", "journal_bytes", "dead_letters"}
"""Facts of single processes that the lines above the table tell."""
_COLUMNS = ("process", "pid", "up", "uptime", "restarts", "memory", "facts")


def register(app: typer.Typer) -> None:
    """Add the command."""
    exits = {0: "one runs", 1: "none runs on this data directory"}
    command(app, "status", example="ibexctl status\nibexctl status --json", exits=exits)(status)


def status() -> Answer:
    """Show the running server: its address, its processes, what is under way, and what waits in the journal."""
    settings = read_settings()

    from ibex.server.supervision.status import request_status

    node = request_status(settings)
    in_flight = sum(int(process.facts.get("in_flight", 0)) for process in node.processes)
    facts = {
        "version": node.version,
        "env": node.env,
        "state": _describe_state(node, in_flight),
        "url": node.url,
        "metrics_url": node.metrics_url,
        "data_dir": node.data_dir,
        "upstream": f"{node.upstream} ({node.llm_mode})",
        "started_at": node.started_at,
        "uptime": format_span(node.uptime_seconds),
        "engines": node.engines or "none: every store is given by its address",
        "in_flight": in_flight,
        "journal": _describe_journal(node.processes, settings),
    }
    rows = [
        (
            process.name,
            process.pid,
            process.is_up,
            format_span(process.uptime_seconds),
            process.restarts,
            format_bytes(process.memory_bytes),
            {name: fact for name, fact in process.facts.items() if name not in _SUMMED_UP and fact is not None},
        )
        for process in node.processes
    ]
    is_whole = node.stop is not None or all(process.is_up for process in node.processes)
    notes = () if is_whole else ("A process is down: the server starts it again; its log says why it fell.",)
    return Answer(node.as_dict(), (Fields(facts), "", Table(_COLUMNS, rows)), notes)


def _describe_state(node: "NodeStatus", in_flight: int) -> str:
    if node.stop is None:
        return "serving"
    return f"{node.stop.doing}, {in_flight:,} in flight, {node.stop.seconds_left:.0f} s left"


def _describe_journal(processes: "Iterable[ProcessStatus]", settings: "Settings") -> str:
    """What the recorder last said of the turns that wait for delivery."""
    facts = next((process.facts for process in processes if process.name == "recorder"), None)
    if facts is None:
        return _describe_lone_recorder(settings)
    if not facts:  # it reports each second
        return "the recorder has not said yet"
    waiting = f"{facts['pending_turns']:,.0f} turns wait"
    if facts["pending_turns"]:
        waiting += f", the oldest for {format_span(facts['oldest_seconds'])}"
    refused = f", {facts['dead_letters']:,.0f} refused by a store" if facts["dead_letters"] else ""
    return f"{waiting}, {format_bytes(int(facts['journal_bytes']))}{refused}"


def _describe_lone_recorder(settings: "Settings") -> str:
    from ibex.recorder.lock import find_recorder

    pid = find_recorder(settings.journal_dir)
    if pid is None:
        return "NOBODY DELIVERS IT: this server was started with --no-recorder; start `ibexctl recorder`"
    return f"delivered by process {pid} (`ibexctl recorder`); `ibexctl journal status` shows what waits"


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
