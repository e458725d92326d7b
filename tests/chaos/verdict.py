"""Whether what the stores say is what the clients saw: contract 9's table, line by line, without any I/O."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from tests.chaos.load import End, Kind, Sight

Row = Mapping[str, Any]

RECORDED = {"ok", "incomplete"}
"""Outcomes that always have a checkpoint; one of a client who left has one if a byte had gone out."""
UNRECORDED = {"provider_error", "replayed"}
OF_THE_PROVIDER = {"422 INVALID_REQUEST", "503 PROVIDER_UNAVAILABLE", "504 PROVIDER_TIMEOUT"}
"""Refusals that end a turn; every other one is ibex's own and leaves no trace."""
SHARED = ("input_tokens", "output_tokens", "cached_tokens", "total_tokens", "usage_source", "request_id", "model")


@dataclass(frozen=True)
class Books:
    """Every row of both stores, and what was put aside on the way there."""

    checkpoints: list[Row]
    sessions: list[Row]
    traces: list[Row]
    put_aside: list[str] = field(default_factory=list)
    """Dead letters, and bytes that could not be read."""


def find_faults(sights: Collection[Sight], books: Books, unnoted: int = 0) -> list[str]:
    """Everything in which the stores differ from what was seen, or from each other.

    `unnoted`: so many checkpoints, and as many traces, are of requests that nobody noted.
    """
    return [
        *books.put_aside,
        *_doubles("checkpoint", books.checkpoints),
        *_doubles("trace", books.traces),
        *_compare_stores(books),
        *_compare_sights(sights, books, unnoted),
        *_compare_sums(sights, books),
        *_check_indexes(books),
    ]


def _doubles(what: str, rows: Iterable[Row]) -> list[str]:
    rows = list(rows)
    return [
        f"{count} {what}s of {column} {value}"
        for column in ("turn_id", "request_id")
        for value, count in Counter(row[column] for row in rows).items()
        if count > 1
    ]


def _compare_stores(books: Books) -> list[str]:
    checkpoints = {row["turn_id"]: row for row in books.checkpoints}
    traces = {row["turn_id"]: row for row in books.traces}
    names = {row["session_id"]: row["external_id"] for row in books.sessions}
    faults = [f"checkpoint {turn_id} without a trace" for turn_id in checkpoints.keys() - traces.keys()]
    for turn_id, trace in traces.items():
        checkpoint, outcome = checkpoints.get(turn_id), trace["outcome"]
        if checkpoint is None:
            if outcome in RECORDED:
                faults.append(f"trace {turn_id} ({outcome}) without a checkpoint")
        elif outcome in UNRECORDED:
            faults.append(f"checkpoint {turn_id} of a turn that was {outcome}")
        elif (
            checkpoint["status"] != outcome
            or checkpoint["is_complete"] != (outcome == "ok")
            or names.get(checkpoint["session_id"]) != trace["session_id"]
            or any(checkpoint[name] != trace[name] for name in SHARED)
        ):
            faults.append(f"checkpoint and trace of {turn_id} differ")
    return faults


def _compare_sights(sights: Collection[Sight], books: Books, unnoted: int) -> list[str]:
    checkpoints = {row["request_id"]: row for row in books.checkpoints}
    traces = {row["request_id"]: row for row in books.traces}
    faults = []
    for sight in sights:
        fault = _judge(sight, checkpoints.get(sight.request_id), traces.get(sight.request_id))
        if fault:
            faults.append(f"{sight.kind} that was seen {sight.end} ({sight.why}): {fault} ({sight.request_id})")
    noted = {sight.request_id for sight in sights}
    for what, found in (("checkpoints", checkpoints), ("traces", traces)):
        unknown = len(found.keys() - noted)
        if unknown != unnoted:
            faults.append(f"{unknown} {what} of requests that nobody noted, not {unnoted}")
    return faults


def _judge(sight: Sight, checkpoint: Row | None, trace: Row | None) -> str | None:
    outcome = None if trace is None else trace["outcome"]
    if trace is not None and trace["session_id"] != sight.session:
        return "another session"
    match sight.end:
        case End.WHOLE:
            return _judge_whole(sight, checkpoint, trace)
        case End.REFUSED | End.CUT:
            expected = _expected_of_failure(sight)
            if outcome != expected or (checkpoint is not None) != (expected == "incomplete"):
                return f"recorded as {outcome}, {'with' if checkpoint else 'without'} a checkpoint, not as {expected}"
        case End.LEFT:
            return _judge_left(sight, checkpoint, outcome)
        case End.BROKEN:  # nobody promised anything; that both stores agree is looked at elsewhere
            pass
    return None


def _expected_of_failure(sight: Sight) -> str | None:
    """The outcome of a turn whose client was told an error; None: there was no turn, or it could not be kept."""
    if sight.end is End.CUT:
        return None if sight.why == "SERVICE_DEGRADED" else "incomplete"
    return "provider_error" if sight.why in OF_THE_PROVIDER else None


def _judge_left(sight: Sight, checkpoint: Row | None, outcome: str | None) -> str | None:
    """The first ending wins: the provider may have failed, or the reply been whole, before ibex saw the client go."""
    if sight.kind is Kind.HANG_UP_LATE and outcome is not None and (checkpoint is None or outcome == "provider_error"):
        return f"recorded as {outcome}, {'with' if checkpoint else 'without'} a checkpoint, though bytes had come"
    return None


def _judge_whole(sight: Sight, checkpoint: Row | None, trace: Row | None) -> str | None:
    if checkpoint is None or trace is None:
        return f"no {'checkpoint' if checkpoint is None else 'trace'}"
    if checkpoint["turn_id"] != sight.turn_id or trace["turn_id"] != sight.turn_id:
        return "another turn id"
    if not checkpoint["is_complete"] or trace["outcome"] != "ok":
        return f"recorded as {trace['outcome']}"
    if checkpoint["usage_source"] != "provider":
        return "no usage"
    if sight.usage not in {None, (checkpoint["input_tokens"], checkpoint["output_tokens"])}:
        return "another usage"
    return None


def _compare_sums(sights: Collection[Sight], books: Books) -> list[str]:
    """The tokens of all turns together: in one store, in the other, and as far as the clients were told."""
    faults = []
    recorded = {row["turn_id"] for row in books.checkpoints}
    told = {sight.request_id: sight.usage for sight in sights if sight.end is End.WHOLE and sight.usage is not None}
    for position, name in enumerate(("input_tokens", "output_tokens")):
        kept = sum(row[name] or 0 for row in books.checkpoints)
        traced = sum(row[name] or 0 for row in books.traces if row["turn_id"] in recorded)
        if kept != traced:
            faults.append(f"{name}: {kept} in checkpoints, {traced} in their traces")
        seen = sum(usage[position] for usage in told.values())
        kept = sum(row[name] or 0 for row in books.checkpoints if row["request_id"] in told)
        if seen != kept:
            faults.append(f"{name}: {seen} were told to clients, {kept} are in the checkpoints of those turns")
    return faults


def _check_indexes(books: Books) -> list[str]:
    indexes: dict[UUID, list[int]] = defaultdict(list)
    for row in books.checkpoints:
        indexes[row["session_id"]].append(row["turn_index"])
    faults = [
        f"session {session_id} has the indexes {sorted(found)[:8]}…"
        for session_id, found in indexes.items()
        if sorted(found) != list(range(len(found)))
    ]
    return faults + [
        f"session {session['external_id']} counts {session['turn_count']} turns"
        for session in books.sessions
        if session["turn_count"] != len(indexes[session["session_id"]])
    ]
