"""Traces in ClickHouse: how turns get there once, and how they are read, organization by organization."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeAlias
from uuid import UUID

from clickhouse_connect.datatypes.registry import get_from_name

from ibex.domain.identity import AgentId, OrgId
from ibex.domain.turns import Turn
from ibex.stores.clickhouse.client import ClickHouse, ClickHouseAddress, translated
from ibex.stores.clickhouse.erasure import TraceErasure
from ibex.stores.clickhouse.stats import TraceStats
from ibex.stores.tallies import (
    IN_PERIOD,
    LEAVES_CHECKPOINT,
    TRACE_TALLY,
    Period,
    StoredTurn,
    StoredTurns,
    Tallies,
    Tally,
)

Traces: TypeAlias = list[dict[str, Any]]
"""Rows whose keys are `TRACE_COLUMNS`; times are aware datetimes in UTC."""

_INSERT_SECONDS = 30.0
_QUERY_SECONDS = 30.0
_LOOKUP_IDS = 2000
"""Turn ids in one look-up: well below ClickHouse's limit on the length of a query (256 KiB)."""
_QUERY_BYTES = 200 << 10
_QUERY_MARGIN = 64 << 10
"""For what the driver adds: the format, and the parameters' values."""


@dataclass(frozen=True, slots=True)
class _Column:
    name: str
    kind: str
    read: Callable[[Turn], object]


def _column(name: str, kind: str, read: Callable[[Turn], object] | None = None) -> _Column:
    return _Column(name, kind, read or attrgetter(name))


_COLUMNS = (
    _column("turn_id", "UUID"),
    _column("request_id", "UUID"),
    _column("org_id", "UUID"),
    _column("agent_id", "UUID"),
    _column("session_id", "String", attrgetter("external_id")),
    _column("replay_of", "Nullable(UUID)"),
    _column("directive_version", "Nullable(UInt32)"),
    _column("model", "LowCardinality(String)"),
    _column("provider", "LowCardinality(String)"),
    _column("is_streaming", "Bool"),
    _column("input_tokens", "Nullable(UInt64)"),
    _column("output_tokens", "Nullable(UInt64)"),
    _column("cached_tokens", "Nullable(UInt64)"),
    _column("total_tokens", "Nullable(UInt64)"),
    _column("usage_source", "LowCardinality(String)"),
    _column("attempts", "UInt16"),
    _column("requested_at", "DateTime64(3, 'UTC')", lambda turn: turn.requested_at // 1000),
    _column("completed_at", "DateTime64(3, 'UTC')", lambda turn: turn.completed_at // 1000),
    _column("auth_latency_us", "UInt64"),
    _column("rate_limit_latency_us", "UInt64"),
    _column("directive_latency_us", "UInt64"),
    _column("overhead_latency_us", "UInt64"),
    _column("provider_ttfb_ms", "Nullable(Float64)"),
    _column("total_latency_ms", "Float64"),
    _column("status_code", "UInt16"),
    _column("outcome", "LowCardinality(String)"),
    _column("error_code", "LowCardinality(Nullable(String))"),
)
_COLUMN_NAMES = [column.name for column in _COLUMNS]
TRACE_COLUMNS = (*_COLUMN_NAMES, "inserted_at")
"""What a trace read back has, in order."""


class TraceStore:
    """The table `llm_traces`. Every read names the organizations whose rows it may see."""

    def __init__(self, dsn: str) -> None:
        self._clickhouse = ClickHouse(ClickHouseAddress.parse(dsn))
        self._types = [get_from_name(column.kind) for column in _COLUMNS]
        self.stats = TraceStats(self._select)
        self.erasure = TraceErasure(self._clickhouse)

    @classmethod
    async def connect(cls, dsn: str) -> "TraceStore":
        """A store that connects when it is first used: nothing here waits for ClickHouse. Raises ConfigurationError."""
        return cls(dsn)

    async def close(self) -> None:
        """Close the connections."""
        await self._clickhouse.close()

    async def ping(self) -> None:
        """Raise StoreUnavailable unless ClickHouse answers a query."""
        with translated():
            await (await self._clickhouse.client()).query("select 1")

    async def insert(self, turns: Sequence[Turn], token: str) -> None:
        """Store turns as one batch. The same batch under the same token is stored once, however often it is sent.

        Another batch under a token that was used is dropped in silence: a token must name its content. Raises
        StoreRefused when a row's content is at fault, StoreUnavailable otherwise; then the batch may have been stored.
        """
        if not turns:
            return
        columns = [[column.read(turn) for turn in turns] for column in _COLUMNS]
        with translated():
            async with asyncio.timeout(_INSERT_SECONDS):
                client = await self._clickhouse.client()
                await client.insert(
                    "llm_traces",
                    columns,
                    column_names=_COLUMN_NAMES,
                    column_types=self._types,
                    column_oriented=True,
                    settings={
                        "async_insert": 0,
                        "insert_deduplicate": 1,
                        "insert_deduplication_token": token,
                        "wait_end_of_query": 1,
                    },
                )

    async def find(self, turns: Sequence[Turn]) -> set[UUID]:
        """Which of these turns are stored: their turn ids."""
        found: set[UUID] = set()
        for at in range(0, len(turns), _LOOKUP_IDS):
            part = turns[at : at + _LOOKUP_IDS]
            times = [turn.requested_at // 1000 for turn in part]
            turn_ids = ",".join(f"'{turn.turn_id}'" for turn in part)
            rows = await self._select(
                ("turn_id",),
                [OrgId(turn.org_id) for turn in part],
                f"turn_id in ({turn_ids})"
                f" and requested_at >= fromUnixTimestamp64Milli({min(times)})"
                f" and requested_at <= fromUnixTimestamp64Milli({max(times)})",
            )
            found.update(row["turn_id"] for row in rows)
        return found

    async def list(
        self,
        *,
        org_ids: Sequence[OrgId],
        agent: AgentId | None = None,
        session: str | None = None,
        limit: int | None = 50,
        is_oldest_first: bool = False,
    ) -> Traces:
        """Traces of these organizations, newest first; those of one agent, or of one session (its external id).

        `limit=None` is all.
        """
        conditions, parameters = ["true"], dict[str, Any]()
        if agent is not None:
            conditions.append("agent_id = {agent:UUID}")
            parameters["agent"] = agent
        if session is not None:
            conditions.append("session_id = {session:String}")
            parameters["session"] = session
        direction = "asc" if is_oldest_first else "desc"
        rest = f"order by requested_at {direction}, turn_id {direction}" + (
            f" limit {limit:d}" if limit is not None else ""
        )
        return await self._select(TRACE_COLUMNS, org_ids, " and ".join(conditions), parameters, rest=rest)

    async def show(self, trace_id: UUID, *, org_ids: Sequence[OrgId]) -> Traces:
        """The traces with this turn or request id, oldest first: a request id may be the client's, and have many."""
        condition = "(turn_id = {id:UUID} or request_id = {id:UUID})"
        return await self._select(
            TRACE_COLUMNS, org_ids, condition, {"id": trace_id}, rest="order by requested_at, turn_id"
        )

    async def scan(self, org_id: OrgId, *, page: int = 5000) -> AsyncIterator[dict[str, Any]]:
        """Every trace of an organization, agent by agent, oldest first, `page` rows a query."""
        condition, after = "true", dict[str, Any]()
        while True:
            rest = f"order by agent_id, requested_at, turn_id limit {page:d}"
            rows = await self._select(TRACE_COLUMNS, [org_id], condition, after, rest=rest)
            for row in rows:
                yield row
            if len(rows) < page:
                return
            after = {name: rows[-1][name] for name in ("agent_id", "requested_at", "turn_id")}
            condition = (
                "(agent_id, requested_at, turn_id) >"
                " ({agent_id:UUID}, {requested_at:DateTime64(3, 'UTC')}, {turn_id:UUID})"
            )

    async def tally(self, org_ids: Sequence[OrgId], period: Period) -> Tallies:
        """The traces of these organizations whose endings leave a checkpoint, minute by minute."""
        rows = await self._select(
            TRACE_TALLY,
            org_ids,
            f"{LEAVES_CHECKPOINT} and {IN_PERIOD}",
            {"since": period.since, "until": period.until},
            rest="group by minute, org_id",
        )
        return [Tally(*(row.values())) for row in rows]

    async def find_turns(self, org_id: OrgId, period: Period) -> StoredTurns:
        """Such traces of one organization, one by one: a turn that was stored twice is in it twice."""
        rows = await self._select(
            StoredTurn._fields,
            [org_id],
            f"{LEAVES_CHECKPOINT} and {IN_PERIOD}",
            {"since": period.since, "until": period.until},
        )
        return [StoredTurn(**row) for row in rows]

    async def _select(
        self,
        columns: Sequence[str],
        org_ids: Sequence[OrgId],
        condition: str,
        parameters: dict[str, Any] | None = None,
        *,
        rest: str = "",
    ) -> Traces:
        """The only query there is: it cannot be asked without organizations, and without any it finds nothing."""
        if not org_ids:
            return []
        orgs = ",".join(f"'{org_id}'" for org_id in sorted({UUID(str(org_id)) for org_id in org_ids}))
        sql = f"select {', '.join(columns)} from llm_traces where org_id in ({orgs}) and {condition} {rest}"  # noqa: S608 - ids and own names only
        with translated():
            async with asyncio.timeout(_QUERY_SECONDS):
                client = await self._clickhouse.client()
                result = await client.query(sql, parameters=parameters, settings=_room_for(sql))
        return list(result.named_results())


def _room_for(sql: str) -> dict[str, int]:
    """Settings of a query that names so many organizations that it is longer than ClickHouse reads by default. Ids as a
    parameter would not do: in the address they are too long, and in a form a field may have 128 KiB.
    """
    length = len(sql.encode())
    return {} if length < _QUERY_BYTES else {"max_query_size": length + _QUERY_MARGIN}
