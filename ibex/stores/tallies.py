"""What checkpoints and traces amount to in a minute, in the same terms on both sides, so that they can be compared."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, TypeAlias
from uuid import UUID

from ibex.domain.turns import Turn


@dataclass(frozen=True, slots=True)
class Period:
    """From `since` on, and before `until`; aware times."""

    since: datetime
    until: datetime

    def holds(self, turn: Turn) -> bool:
        """Whether a turn ended in it."""
        return self.since <= datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=turn.completed_at) < self.until


class Tally(NamedTuple):
    """All turns of an organization in a minute that leave a checkpoint."""

    minute: datetime
    org_id: UUID
    turns: int
    id_sum: int
    """The sum of the last 32 bits of their ids, which are random: equal sums mean equal sets, but for one in 2³²."""
    input_tokens: int
    output_tokens: int


class StoredTurn(NamedTuple):
    """What both stores say about one turn."""

    turn_id: UUID
    input_tokens: int | None
    output_tokens: int | None


Tallies: TypeAlias = list[Tally]
StoredTurns: TypeAlias = list[StoredTurn]

TALLY_CHECKPOINTS = """
select date_trunc('minute', completed_at) as minute, org_id, count(*) as turns,
    sum(('x' || right(turn_id::text, 8))::bit(32)::bigint & 4294967295)::bigint as id_sum,
    coalesce(sum(input_tokens), 0)::bigint as input_tokens, coalesce(sum(output_tokens), 0)::bigint as output_tokens
from ibex_core.checkpoints
where completed_at >= $1 and completed_at < $2 and recorded_at >= $1 - interval '1 hour' group by 1, 2
"""
FIND_CHECKPOINTS = """
select turn_id, input_tokens, output_tokens from ibex_core.checkpoints
where org_id = $1 and completed_at >= $2 and completed_at < $3 and recorded_at >= $2 - interval '1 hour'
"""
"""The index is on recorded_at: a turn is recorded after its end, and no clocks differ by an hour."""

TRACE_TALLY = (
    "toStartOfMinute(completed_at) as minute",
    "org_id",
    "count() as turns",
    "sum(reinterpretAsUInt32(reverse(unhex(right(toString(turn_id), 8))))) as id_sum",
    "sum(ifNull(input_tokens, 0)) as input_sum",
    "sum(ifNull(output_tokens, 0)) as output_sum",
)
"""Columns of a tally in ClickHouse. The sums are not called as the columns are: an alias would hide the column."""

LEAVES_CHECKPOINT = "(outcome in ('ok', 'incomplete') or (outcome = 'client_disconnect' and status_code = 200))"
"""Which traces have a checkpoint: a client that left before the first byte got no status but 499."""

IN_PERIOD = "completed_at >= {since:DateTime64(3, 'UTC')} and completed_at < {until:DateTime64(3, 'UTC')}"
