"""What the stores say in the end, and whether it is what the clients saw: contract 9's table, line by line."""

import asyncio
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import asyncpg

from ibex.config import Settings, load_settings
from ibex.domain.identity import DEV_ORG_ID
from ibex.engines.addresses import resolve_addresses
from ibex.errors import IbexError
from ibex.stores.clickhouse import TraceStore
from tests.acceptance.conftest import House
from tests.chaos.conftest import ChaosHouse
from tests.chaos.load import End, Sight

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Books:
    """Every row of both stores."""

    checkpoints: list[Row]
    sessions: list[Row]
    traces: list[Row]


def settings_of(house: House) -> Settings:
    """The settings a house was started with."""
    return load_settings({"IBEX_ENV_FILE": os.devnull, "IBEX_DATA_DIR": house.environ["IBEX_DATA_DIR"]})


async def read_books(settings: Settings) -> Books:
    """Read both stores; raises StoreUnavailable, or what asyncpg raises, while one is away."""
    addresses = resolve_addresses(settings)
    connection = await asyncpg.connect(addresses.postgres_admin)
    try:
        checkpoints = await connection.fetch("select * from ibex_core.checkpoints order by session_id, turn_index")
        sessions = await connection.fetch("select session_id, external_id, turn_count from ibex_core.sessions")
    finally:
        await connection.close()
    traces = TraceStore(addresses.clickhouse)
    try:
        return Books(checkpoints, sessions, await traces.list(org_ids=[DEV_ORG_ID], limit=None))
    finally:
        await traces.close()


async def settle(house: ChaosHouse, *, within: float = 30.0) -> Books:
    """Wait until the stores have all that the clients saw; fail with what is wrong when they never do."""
    settings = settings_of(house)
    faults: list[str] = ["the stores could not be read"]
    try:
        async with asyncio.timeout(within):
            while True:
                try:
                    books = await read_books(settings)
                except (IbexError, OSError, asyncpg.PostgresError):
                    pass
                else:
                    faults = find_faults(house.sights, books, house.unnoted)
                    if not faults:
                        return books
                await asyncio.sleep(0.25)
    except TimeoutError:
        raise AssertionError(f"{len(faults)} faults:\n" + "\n".join(faults[:20])) from None


def find_faults(sights: list[Sight], books: Books, unnoted: int) -> list[str]:
    """Everything in which the stores differ from what was seen, or from each other.

    `unnoted`: so many checkpoints are of requests that nobody noted.
    """
    return [
        *_doubles("trace", books.traces, "turn_id"),
        *_doubles("checkpoint", books.checkpoints, "request_id"),
        *_doubles("trace", books.traces, "request_id"),
        *_compare_stores(books),
        *_compare_sights(sights, books, unnoted),
        *_check_indexes(books),
    ]


def _doubles(what: str, rows: Iterable[Row], column: str) -> list[str]:
    counts = Counter(row[column] for row in rows)
    return [f"{count} {what}s of {column} {value}" for value, count in counts.items() if count > 1]


def _compare_stores(books: Books) -> list[str]:
    checkpoints = {row["turn_id"]: row for row in books.checkpoints}
    traces = {row["turn_id"]: row for row in books.traces}
    faults = [f"checkpoint {turn_id} without a trace" for turn_id in checkpoints.keys() - traces.keys()]
    for turn_id, trace in traces.items():
        checkpoint, outcome = checkpoints.get(turn_id), trace["outcome"]
        if outcome in {"ok", "incomplete"} and checkpoint is None:
            faults.append(f"trace {turn_id} ({outcome}) without a checkpoint")
        elif outcome in {"provider_error", "replayed"} and checkpoint is not None:
            faults.append(f"checkpoint {turn_id} of a turn that was {outcome}")
        elif checkpoint is not None:
            names = ("input_tokens", "output_tokens", "cached_tokens", "total_tokens", "usage_source", "request_id")
            if checkpoint["status"] != outcome or any(checkpoint[name] != trace[name] for name in names):
                faults.append(f"checkpoint and trace of {turn_id} differ")
    for name in ("input_tokens", "output_tokens"):
        sums = [
            sum(row[name] or 0 for row in rows)
            for rows in (books.checkpoints, [traces[turn_id] for turn_id in checkpoints if turn_id in traces])
        ]
        if sums[0] != sums[1]:
            faults.append(f"{name}: {sums[0]} in checkpoints, {sums[1]} in their traces")
    return faults


def _compare_sights(sights: list[Sight], books: Books, unnoted: int) -> list[str]:
    checkpoints = {row["request_id"]: row for row in books.checkpoints}
    traces = {row["request_id"]: row for row in books.traces}
    faults = []
    for sight in sights:
        checkpoint, trace = checkpoints.get(sight.request_id), traces.get(sight.request_id)
        fault = _judge(sight, checkpoint, trace)
        if fault:
            faults.append(f"{sight.kind} that was seen {sight.end}: {fault} ({sight.request_id})")
    unknown = checkpoints.keys() - {sight.request_id for sight in sights}
    if len(unknown) != unnoted:
        faults.append(f"{len(unknown)} checkpoints of requests that nobody noted, not {unnoted}")
    return faults


def _judge(sight: Sight, checkpoint: Row | None, trace: Row | None) -> str | None:
    match sight.end:
        case End.WHOLE:
            if checkpoint is None or trace is None:
                return f"no {'checkpoint' if checkpoint is None else 'trace'}"
            if checkpoint["turn_id"] != sight.turn_id or trace["turn_id"] != sight.turn_id:
                return "another turn id"
            if not checkpoint["is_complete"] or trace["outcome"] != "ok":
                return f"recorded as {trace['outcome']}"
            if sight.usage not in {None, (checkpoint["input_tokens"], checkpoint["output_tokens"])}:
                return "another usage"
        case End.REFUSED:
            if checkpoint is not None:
                return "a checkpoint"
            if trace is not None and trace["outcome"] != "provider_error":
                return f"recorded as {trace['outcome']}"
        case End.CUT:
            if checkpoint is not None and checkpoint["is_complete"]:
                return "recorded as complete"
        case End.LEFT | End.BROKEN:
            pass
    return None


def _check_indexes(books: Books) -> list[str]:
    indexes: dict[UUID, list[int]] = defaultdict(list)
    for row in books.checkpoints:
        indexes[row["session_id"]].append(row["turn_index"])
    faults = [
        f"session {session_id} has the indexes {found[:8]}…"
        for session_id, found in indexes.items()
        if sorted(found) != list(range(len(found)))
    ]
    return faults + [
        f"session {session['external_id']} counts {session['turn_count']} turns"
        for session in books.sessions
        if session["turn_count"] != len(indexes[session["session_id"]])
    ]
