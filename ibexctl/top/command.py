"""`ibexctl top`: the command, and a sample as plain text."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from ibex.errors import ConfigurationError
from ibexctl.command import command, invocation_of
from ibexctl.operation import operate, read_settings
from ibexctl.output import Answer, Fields, Table, View, is_terminal
from ibexctl.status import format_bytes, format_span

if TYPE_CHECKING:
    from ibex.config import Settings
    from ibex.runtime import Operator
    from ibexctl.top.sample import Sample

_LEADERS = 20
_EXAMPLE = """\
ibexctl top
ibexctl top --interval 5
ibexctl top --once --json"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    exits = {0: "it was left", 1: "no server runs on this data directory"}
    command(app, "top", example=_EXAMPLE, exits=exits)(top)


def top(
    ctx: typer.Context,
    interval: Annotated[
        float, typer.Option("--interval", metavar="SECONDS", min=0.5, max=3600, help="Between two looks.")
    ] = 2.0,
    is_once: Annotated[bool, typer.Option("--once", help="One sample as plain text, then stop.")] = False,
) -> Answer | None:
    """Watch the running server: its traffic, latencies, errors, stores, processes, and busiest organizations.

    It asks the server on this data directory, and ClickHouse for the organizations' last minute. Rates are over the
    last five seconds. q or Ctrl-C ends it; while the server is away, it waits for it.

    With --once or --json, or where standard output is no terminal, it looks twice, one interval apart, and prints one
    sample. Fails when no server runs on this data directory.
    """
    is_live = is_terminal(sys.stdout) and is_terminal(sys.stdin) and not (is_once or invocation_of(ctx).is_json)
    settings = read_settings()

    from ibex.server.supervision.status import request_status

    request_status(settings)  # before the stores: without a server, those that are embedded would be started
    sample = _look(settings, interval, is_live=is_live)
    return None if sample is None else Answer(sample.as_data(), _views(sample))


def _look(settings: "Settings", interval: float, *, is_live: bool) -> "Sample | None":
    """One sample; or, on a live screen, one after the other, until it is left."""
    import asyncio

    async def act(operator: "Operator | None") -> "Sample | None":
        from ibexctl.top.collector import Collector

        collector = Collector(settings, operator)
        if is_live:
            from ibexctl.top.live import watch

            await watch(collector, interval)
            return None
        await collector.look()
        await asyncio.sleep(interval)
        return await collector.look()

    try:
        return operate(act, settings=settings, clickhouse=True)
    except ConfigurationError:  # a node of production seldom knows its database's owner
        return asyncio.run(act(None))


def _views(sample: "Sample") -> tuple[View, ...]:
    """A sample as plain text."""
    traffic, journal = sample.traffic, sample.journal
    facts: dict[str, object] = {
        "node": f"ibex {sample.version} at {sample.url} ({sample.env}), up {format_span(sample.uptime_seconds)}",
        "state": sample.state,
        "requests/s": traffic.requests,
        "in flight": traffic.in_flight,
        "open streams": traffic.open_streams,
        "errors/s": dict(traffic.errors) or "none",
        "tokens/s": f"{traffic.input_tokens:,.1f} in, {traffic.output_tokens:,.1f} out",
        **{f"{name.replace('_', ' ')} p50, p99 ms": f"{_figure(one.p50_ms)}, {_figure(one.p99_ms)}"
           for name, one in sample.latency.items()},
        "auth cache hits": _share(sample.caches.auth),
        "directive cache hits": _share(sample.caches.directive),
        "denied/s": sample.limits.denied,
        "redis misses/s": sample.limits.redis_errors,
        "journal": f"{journal.pending_turns:,} turns wait, the oldest for {format_span(journal.oldest_seconds)},"
        f" {format_bytes(journal.bytes)} of {format_bytes(journal.max_bytes)}",
        **{check.name: check.message or check.status for check in sample.checks if check.name != "journal"},
    }  # fmt: skip
    if sample.leaders_missing:
        facts["organizations"] = sample.leaders_missing
    processes = [
        (one.name, one.pid, one.is_up, _share(one.cpu), format_bytes(one.memory_bytes), one.restarts, one.in_flight)
        for one in sample.processes
    ]
    leaders = [
        (one.name, one.turns, one.tokens, one.errors, one.p50_ms, one.org_id)
        for one in (sample.leaders or ())[:_LEADERS]
    ]
    empty = sample.leaders_missing or "No turn in the last minute."
    return (
        Fields(facts),
        "",
        Table(("process", "pid", "up", "cpu", "memory", "restarts", "in_flight"), processes),
        "",
        Table(("organization", "turns", "tokens", "errors", "p50_ms", "org_id"), leaders, empty=empty),
    )


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
