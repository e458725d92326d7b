"""`ibexctl serve`: the server in the foreground, and what it says when it is ready."""

import shlex
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from ibexctl.command import command, invocation_of
from ibexctl.operation import read_settings
from ibexctl.output import Answer, Fields, View, note, show

if TYPE_CHECKING:
    from ibex.config import Settings
    from ibex.server.messages import Unfinished
    from ibex.server.supervision.shutdown import StopResult
    from ibex.server.supervision.status import NodeStatus

_STORES = {
    "postgres": ("postgres_dsn", "embedded PostgreSQL"),
    "redis": ("redis_url", "embedded Valkey"),
    "clickhouse": ("clickhouse_dsn", "embedded ClickHouse (chDB), for development and trials: not for production"),
}


def register(app: typer.Typer) -> None:
    """Add the command."""
    exits = {0: "it ended, and cut nobody", 1: "it did not start, or the end of IBEX_SHUTDOWN_TIMEOUT cut a request"}
    command(app, "serve", example="ibexctl serve\nibexctl serve --port 9000 --workers 4", exits=exits)(serve)


def serve(
    ctx: typer.Context,
    host: Annotated[
        str | None, typer.Option("--host", metavar="ADDRESS", help="Address to listen on (IBEX_HOST).")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            "--port", metavar="PORT", min=0, max=65535, help="Port to listen on; 0 takes a free one (IBEX_PORT)."
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", metavar="N", min=1, max=128, help="Worker processes (IBEX_WORKERS).")
    ] = None,
    has_recorder: Annotated[
        bool,
        typer.Option("--recorder/--no-recorder", help="Whether to deliver the journal; else ibexctl recorder does."),
    ] = True,
) -> None:
    """Serve until Ctrl-C or SIGTERM, then let what is under way finish; a second one does not wait.

    Starts the proxy's workers, the recorder, and the stores that are embedded: PostgreSQL, Valkey and ClickHouse where
    no address of your own is given. When it serves it says where, and a line that tries it. `ibexctl reload` replaces
    its processes without a refused request.
    """
    settings = read_settings(host=host, port=port, workers=workers)
    is_json = invocation_of(ctx).is_json

    def announce(node: "NodeStatus") -> None:
        show(describe(node, settings), is_json=is_json)

    from ibex.server.supervision.supervisor import serve as supervise

    result = supervise(
        settings,
        on_progress=note,
        on_ready=announce,
        reload=lambda: read_settings(host=host, port=port, workers=workers),
        has_recorder=has_recorder,
    )
    for line in describe_stop(result):
        note(line)
    if not result.is_clean:
        raise typer.Exit(1)


def describe(node: "NodeStatus", settings: "Settings") -> Answer:
    """What runs, where its data lies, how to try it: the only place where the development token is printed."""
    is_sandbox = node.llm_mode == "sandbox"
    stores = describe_stores(settings, _STORES)
    data = {
        "url": node.url,
        "metrics_url": node.metrics_url,
        "version": node.version,
        "env": node.env,
        "data_dir": node.data_dir,
        "stores": stores,
        "upstream": {"url": node.upstream, "mode": node.llm_mode, "is_stand_in": is_sandbox},
        "start_seconds": node.start_seconds,
        "warnings": node.warnings,
        "processes": [{"name": process.name, "pid": process.pid} for process in node.processes],
    }
    facts = {
        "data": f"{node.data_dir}{' (new)' if node.is_first_start else ''}",
        **stores,
        "upstream": _describe_upstream(node),
        "metrics": node.metrics_url,
        **({"warning": "; ".join(node.warnings)} if node.warnings else {}),
    }
    started = "" if node.start_seconds is None else f", ready in {node.start_seconds:.1f} s"
    title = f"ibex {node.version} serves on {node.url} ({node.env}{started})"
    views: list[View] = [title, "", Fields(facts)]
    if settings.is_development:
        views += ["", "Try it:", "", try_line(node.url)]
    return Answer(data, (*views, "", "Ctrl-C stops it all."))


def describe_stop(result: "StopResult") -> list[str]:
    """How the stop went, for people: standard output has had its one answer."""
    waiting = result.undelivered_turns
    journal = [f"The journal keeps {waiting:,} turns for the next start to deliver."] if waiting else []
    after = f"after {result.seconds:.1f} s"
    if result.is_clean:
        return [f"Stopped {after}; nothing was cut.", *journal]
    why = "told twice to stop" if result.is_hurried else "at the end of IBEX_SHUTDOWN_TIMEOUT"
    cuts = [f"       {name}: {_describe_cut(cut)}" for name, cut in result.unfinished]
    return [f"error: Stopped {after}, and cut what was not finished, {why}:", *cuts, *journal]


def _describe_cut(cut: "Unfinished") -> str:
    counts = (cut.streams, "stream"), (cut.requests, "request")
    return ", ".join(f"{count} {what}{'s' if count > 1 else ''}" for count, what in counts if count)


def try_line(url: str) -> str:
    """A curl line that works as pasted: the development token, in clear."""
    from ibex.domain.identity import DEV_AGENT_ID, DEV_TOKEN

    body = '{"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Reply with exactly: hello"}]}'
    words = ("curl", "-s", f"{url}/v1/chat/completions")
    headers = (
        f"Authorization: Bearer {DEV_TOKEN}",
        f"X-IBEX-Agent-ID: {DEV_AGENT_ID}",
        "Content-Type: application/json",
    )
    lines = [shlex.join(words), *(shlex.join(("-H", header)) for header in headers), shlex.join(("-d", body))]
    return " \\\n  ".join(lines)


def describe_stores(settings: "Settings", names: Iterable[str]) -> dict[str, str]:
    """Where each of these stores is, without its secrets."""
    return {name: _describe_store(settings, *_STORES[name]) for name in names}


def _describe_store(settings: "Settings", field: str, embedded: str) -> str:
    from ibex.config import EMBEDDED

    dsn = getattr(settings, field).get_secret_value()
    return embedded if dsn == EMBEDDED else display_dsn(dsn)


def display_dsn(dsn: str) -> str:
    """A store's address without user, password and parameters."""
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(dsn)
        place = parts.hostname or ""
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "as configured"
    if "@" in parts.path:  # a password with a slash in it ends the authority early
        return "as configured"
    return f"{parts.scheme}://{place}{port}{parts.path}"


def _describe_upstream(node: "NodeStatus") -> str:
    if node.llm_mode == "sandbox":
        return "the ibex sandbox: a STAND-IN that answers by rule, no model; set OPENAI_API_KEY for a real one"
    return node.upstream
