"""`ibexctl journal`: turns on their way to the stores, those that were set aside, and the journals of lost nodes."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ibex.errors import UnknownEntity
from ibexctl.command import command, group
from ibexctl.operation import operate, read_settings
from ibexctl.output import Answer, Fields, Table
from ibexctl.status import format_bytes

if TYPE_CHECKING:
    from ibex.recorder.salvage import Salvage
    from ibex.runtime import Operator

app = group("The journal: turns on their way to the stores, and those that were set aside.")
dead_letters = group("Turns that a store refused for their content.")
app.add_typer(dead_letters, name="dead-letters")

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_EXITS = {0: "both stores have all of it", 1: "something is left: a store is away, or a worker still writes"}
_COLUMNS = ("dead_letter_id", "store", "turn_id", "put_aside_at", "reason")


@command(app, "status", example="ibexctl journal status")
def status() -> Answer:
    """Show what the journal holds, what each store still lacks, and how near the journal is to its bounds.

    Works with and without a running server.
    """
    settings = read_settings()

    from ibex.recorder.survey import survey_journal

    survey = survey_journal(settings)
    put_aside = survey.count_dead_letters()
    stores = [
        {
            "store": sink,
            "pending_turns": len(backlog.turns),
            "oldest_at": None if backlog.oldest_at is None else _EPOCH + timedelta(microseconds=backlog.oldest_at),
            "dead_letters": put_aside[sink],
        }
        for sink, backlog in survey.pending.items()
    ]
    data = {
        "directory": str(survey.directory),
        "bytes": survey.size,
        "max_bytes": settings.journal_max_bytes,
        "free_bytes": survey.free_bytes,
        "min_free_bytes": settings.journal_min_free_bytes,
        "max_age_seconds": settings.journal_max_age_seconds or None,
        "pressure": round(survey.pressure, 3),
        "segments": survey.segments,
        "growing_segments": survey.growing_segments,
        "unsupported_segments": survey.unsupported_segments,
        "quarantined": [path.name for path in survey.quarantined],
        "stores": stores,
    }
    facts = {
        "directory": survey.directory,
        "size": f"{format_bytes(survey.size)} of {format_bytes(settings.journal_max_bytes)}",
        "free disk": f"{format_bytes(survey.free_bytes)}, at least {format_bytes(settings.journal_min_free_bytes)}",
        "pressure": f"{survey.pressure:.0%}",
        "segments": f"{survey.segments}, of which {survey.growing_segments} are written to",
        "quarantined": len(survey.quarantined),
    }
    columns = ("store", "pending_turns", "oldest_at", "dead_letters")
    table = Table(columns, [[store[name] for name in columns] for store in stores])
    return Answer(data, (Fields(facts), "", table), _advise(survey.pressure, sum(put_aside.values())))


def _advise(pressure: float, put_aside: int) -> list[str]:
    notes = []
    if pressure >= 1:
        notes.append("The journal refuses new chats: bring the store back that is away, or make room on the disk.")
    if put_aside:
        notes.append("`ibexctl journal dead-letters list` shows what was refused, and why.")
    return notes


@command(dead_letters, "list", example="ibexctl journal dead-letters list --limit 20")
def list_dead_letters(
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, max=100_000, help="At most so many.")] = 100,
) -> Answer:
    """List the turns that a store refused for their content, oldest first."""
    settings = read_settings()

    from ibex.recorder.survey import survey_journal

    survey = survey_journal(settings)
    letters = [
        {
            "dead_letter_id": letter.dead_letter_id,
            "store": letter.sink,
            "turn_id": letter.turn_id,
            "put_aside_at": datetime.fromtimestamp(letter.put_aside_at, UTC),
            "reason": letter.reason,
        }
        for letter in survey.dead_letters[:limit]
    ]
    data = {"dead_letters": letters, "quarantined": [path.name for path in survey.quarantined]}
    table = Table(_COLUMNS, [[letter[name] for name in _COLUMNS] for letter in letters], empty="No dead letter.")
    notes = [f"{path} holds {path.stat().st_size} bytes that do not check." for path in survey.quarantined]
    return Answer(data, (table,), notes)


@command(dead_letters, "replay", example="ibexctl journal dead-letters replay 3 4\nibexctl journal dead-letters replay")
def replay_dead_letters(
    ids: Annotated[list[int] | None, typer.Argument(metavar="ID", help="Which; none: all of them.")] = None,
) -> Answer:
    """Have the recorder try refused turns once more, when what was wrong has been mended.

    A turn that is refused again stays.
    """
    settings = read_settings()

    from contextlib import closing

    from ibex.recorder.ledger import DATABASE_NAME, Ledger

    count = 0
    if (settings.journal_dir / DATABASE_NAME).exists():
        with closing(Ledger(settings.journal_dir)) as ledger:
            count = ledger.want_replay(ids or None)
    if count < len(set(ids or ())):
        raise UnknownEntity(
            f"Only {count} of these are dead letters.", hint="`ibexctl journal dead-letters list` shows them."
        )
    note = "The recorder tries them within seconds; when no server runs, at the next start."
    return Answer({"replayed": count}, (f"{count} to be tried again.",), (note,) if count else ())


@command(app, "deliver", example="ibexctl journal deliver /mnt/lost-node/.ibex/journal", exits=_EXITS)
def deliver(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The journal's directory, with its segments.")],
) -> Answer:
    """Deliver the journal of a node that is lost to this one's stores, and remove what both have.

    Turns that a store has already are not stored twice. Run it again when something is left.
    """
    settings = read_settings()

    async def act(operator: "Operator") -> "Salvage":
        from ibex.recorder.salvage import deliver_journal

        return await deliver_journal(directory, operator.sessions, operator.traces)

    salvage = operate(act, settings=settings, clickhouse=True)
    data = {name: getattr(salvage, name) for name in salvage.__slots__}
    left = (
        "Segments are left: a store is away, or a worker still writes. Run it again." if salvage.segments_left else ""
    )
    return Answer(data, notes=[left] if left else [], exit_code=1 if left else 0)
