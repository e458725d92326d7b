"""`ibexctl reconcile`: whether the journal, the checkpoints and the traces of a period agree; cheap enough for cron."""

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from ibexctl import arguments
from ibexctl.command import command
from ibexctl.operation import operate, read_settings
from ibexctl.output import Answer, Fields, Table

if TYPE_CHECKING:
    from ibex.config import Settings
    from ibex.recorder.reconciliation import Reconciliation
    from ibex.runtime import Operator

_COLUMNS = ("minute", "org_id", "turn_id", "fault")
_SHOWN = 1000


def register(app: typer.Typer) -> None:
    """Add the command."""
    exits = {0: "the stores agree", 1: "they differ, or one of them is away"}
    command(app, "reconcile", example="ibexctl reconcile --since 24h", exits=exits)(reconcile)


def reconcile(
    since: Annotated[
        timedelta, typer.Option("--since", metavar="SPAN", parser=arguments.duration, help="How far back.")
    ] = "1h",  # type: ignore[assignment]  # typer parses defaults too
    settle: Annotated[
        timedelta,
        typer.Option(
            "--settle", metavar="SPAN", parser=arguments.duration, help="Leave out what ended so shortly ago."
        ),
    ] = "10s",  # type: ignore[assignment]
) -> Answer:
    """Compare checkpoints and traces turn by turn: does Postgres have what ClickHouse has?

    Counts and sums of each minute and organization are compared first. Turns that still wait in this node's journal
    are no difference; those in other nodes' journals are, so with several nodes give --settle the time they need.
    """
    found = compare_stores(read_settings(), since=since, settle=settle)
    differences = [{name: getattr(item, name) for name in _COLUMNS} for item in found.differences]
    data = {
        "since": found.period.since,
        "until": found.period.until,
        "checkpoints": found.checkpoints,
        "traces": found.traces,
        "pending": found.pending,
        "is_consistent": not differences,
        "differences": differences,
    }
    facts = {
        "since": found.period.since,
        "until": found.period.until,
        "minutes": found.cells,
        "checkpoints": found.checkpoints,
        "traces": f"{found.traces} of turns that leave a checkpoint",
        "pending": found.pending,
        "differences": len(differences),
    }
    rows = [[item[name] for name in _COLUMNS] for item in differences[:_SHOWN]]
    views = (Fields(facts), "", Table(_COLUMNS, rows)) if rows else (Fields(facts),)
    return Answer(data, views, exit_code=1 if differences else 0)


def compare_stores(settings: "Settings", *, since: timedelta, settle: timedelta) -> "Reconciliation":
    """Compare what ended in the time up to `settle` ago, and at most `since` before that. Raises StoreUnavailable."""

    async def act(operator: "Operator") -> "Reconciliation":
        from ibex.recorder.reconciliation import kept_part
        from ibex.recorder.reconciliation import reconcile as compare
        from ibex.recorder.survey import survey_journal
        from ibex.stores.tallies import Period

        until = (datetime.now(UTC) - settle).replace(microsecond=0)  # ClickHouse keeps no more than milliseconds
        survey = survey_journal(settings)  # before the stores: what is delivered meanwhile still counts as pending
        org_ids = await operator.all_org_ids()
        period = kept_part(Period(until - since, until), timedelta(days=settings.checkpoint_retention_days))
        return await compare(survey, operator.sessions, operator.traces, org_ids, period)

    return operate(act, settings=settings, clickhouse=True)
