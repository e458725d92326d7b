"""Whether the journal, the checkpoints and the traces agree: contract 9's table, by minute and organization."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TypeAlias
from uuid import UUID

from ibex.domain.identity import OrgId
from ibex.recorder.survey import Survey
from ibex.stores.clickhouse.traces import TraceStore
from ibex.stores.postgres.sessions import SessionStore
from ibex.stores.tallies import Period, StoredTurn, Tally

Cell: TypeAlias = tuple[datetime, UUID]
"""A minute, and an organization."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One turn that one store has and the other has not, or has otherwise."""

    minute: datetime
    org_id: UUID
    turn_id: UUID
    fault: str


@dataclass(frozen=True, slots=True)
class Reconciliation:
    """What was compared, and in what the stores differ."""

    period: Period
    cells: int
    """Minutes of organizations in which there were turns."""
    checkpoints: int
    traces: int
    """Those whose ending leaves a checkpoint."""
    pending: Mapping[str, int]
    """Turns of the period that wait in this node's journal, by store: they are no difference."""
    differences: Sequence[Difference]


_TRACES_KEPT = timedelta(days=90)
"""ClickHouse's TTL."""
_EXPIRING = timedelta(hours=2)
"""What is so near its end may be gone from one store alone: the times of a turn are an hour apart at most."""


def kept_part(period: Period, retention: timedelta) -> Period:
    """The part of a period of which both stores have everything still; no `retention` of checkpoints is for ever."""
    oldest = datetime.now(UTC) - min(retention or _TRACES_KEPT, _TRACES_KEPT) + _EXPIRING
    return Period(min(max(period.since, oldest), period.until), period.until)


async def reconcile(
    survey: Survey, sessions: SessionStore, traces: TraceStore, org_ids: Sequence[OrgId], period: Period
) -> Reconciliation:
    """Compare both stores over a period; `survey` is the journal's, taken before.

    Counts and sums of each cell first, turn by turn only where they differ. Raises StoreUnavailable.
    """
    in_postgres = {(tally.minute, tally.org_id): tally for tally in await sessions.tally(period)}
    in_clickhouse = {(tally.minute, tally.org_id): tally for tally in await traces.tally(org_ids, period)}
    cells = in_postgres.keys() | in_clickhouse.keys()
    differences = []
    for cell in sorted(cells):
        if in_postgres.get(cell) != in_clickhouse.get(cell):
            differences += await _compare(cell, period, survey, sessions, traces)
    return Reconciliation(
        period=period,
        cells=len(cells),
        checkpoints=_sum(in_postgres),
        traces=_sum(in_clickhouse),
        pending={sink: sum(map(period.holds, backlog.turns)) for sink, backlog in survey.pending.items()},
        differences=differences,
    )


def _sum(tallies: Mapping[Cell, Tally]) -> int:
    return sum(tally.turns for tally in tallies.values())


async def _compare(
    cell: Cell, whole: Period, survey: Survey, sessions: SessionStore, traces: TraceStore
) -> list[Difference]:
    minute, org_id = cell
    period = Period(max(minute, whole.since), min(minute + timedelta(minutes=1), whole.until))
    checkpoints = {turn.turn_id: turn for turn in await sessions.find_turns(OrgId(org_id), period)}
    found = await traces.find_turns(OrgId(org_id), period)
    traced = {turn.turn_id: turn for turn in found}
    waiting = {sink: {turn.turn_id for turn in backlog.turns} for sink, backlog in survey.pending.items()}
    aside = {sink: {letter.turn_id for letter in survey.dead_letters if letter.sink == sink} for sink in waiting}

    def judge(turn_id: UUID) -> str | None:
        checkpoint, trace = checkpoints.get(turn_id), traced.get(turn_id)
        if checkpoint is None:
            return _explain("checkpoint", turn_id in waiting["postgres"], turn_id in aside["postgres"])
        if trace is None:
            return _explain("trace", turn_id in waiting["clickhouse"], turn_id in aside["clickhouse"])
        return None if _agree(checkpoint, trace) else "checkpoint and trace count other tokens"

    faults = [(turn_id, judge(turn_id)) for turn_id in sorted(checkpoints.keys() | traced.keys())]
    doubles = Counter(turn.turn_id for turn in found)
    faults += [(turn_id, f"{count} traces") for turn_id, count in doubles.items() if count > 1]
    return [Difference(minute, org_id, turn_id, fault) for turn_id, fault in faults if fault is not None]


def _explain(what: str, is_pending: bool, is_put_aside: bool) -> str | None:
    if is_put_aside:
        return f"no {what}: the store refused it, see `ibexctl journal dead-letters list`"
    return None if is_pending else f"no {what}"


def _agree(checkpoint: StoredTurn, trace: StoredTurn) -> bool:
    return (checkpoint.input_tokens, checkpoint.output_tokens) == (trace.input_tokens, trace.output_tokens)
