"""`ibexctl recorder`: delivery of the journal as a service of its own, for a server that leaves it to somebody else."""

from typing import TYPE_CHECKING

import typer

from ibexctl.command import command, invocation_of
from ibexctl.operation import read_settings
from ibexctl.output import Answer, Fields, note, show
from ibexctl.serve import describe_stores

if TYPE_CHECKING:
    from ibex.server.lone_recorder import LoneRecorderStatus


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "recorder", example="ibexctl serve --no-recorder\nibexctl recorder")(recorder)


def recorder(ctx: typer.Context) -> None:
    """Deliver the journal to Postgres and ClickHouse until Ctrl-C or SIGTERM.

    For a server that was started with --no-recorder, on the same data directory and with the same settings, so that the
    two can be containers of their own. It sweeps idle sessions too. Fails when the journal has a recorder already.
    """
    settings = read_settings()
    is_json = invocation_of(ctx).is_json

    def announce(status: "LoneRecorderStatus") -> None:
        stores = describe_stores(settings, ("postgres", "clickhouse"))
        data = {
            "version": status.version,
            "pid": status.pid,
            "journal": status.journal,
            "stores": stores,
            "metrics_url": status.metrics_url,
        }
        title = f"ibex {status.version} delivers the journal {status.journal}"
        facts = Fields({**stores, "metrics": status.metrics_url or "none in development"})
        show(Answer(data, (title, "", facts, "", "Ctrl-C stops it.")), is_json=is_json)

    from ibex.server.lone_recorder import record

    left = record(settings, announce)
    note(f"Stopped. The journal keeps {left:,} turns." if left else "Stopped; the journal is delivered.")
