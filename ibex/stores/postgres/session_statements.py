"""The SQL of sessions and checkpoints, and the columns it takes from turns."""

from collections.abc import Sequence

from ibex.domain.turns import Turn

CONTENT = ("messages", "completion")
"""The columns of a checkpoint that hold captured content, as bytes."""

UPSERT_SESSIONS = """
insert into ibex_core.sessions as s (session_id, org_id, agent_id, external_id, last_turn_at)
select session_id, org_id, agent_id, external_id, timestamptz 'epoch' + max(completed_us) * interval '1 microsecond'
from unnest($1::uuid[], $2::uuid[], $3::uuid[], $4::text[], $5::bigint[])
    as t (session_id, org_id, agent_id, external_id, completed_us)
group by session_id, org_id, agent_id, external_id
order by org_id, agent_id, external_id
on conflict (org_id, agent_id, external_id)
    do update set last_turn_at = greatest(s.last_turn_at, excluded.last_turn_at), status = 'active'
returning xmax = 0 as is_new
"""
"""Makes or locks every session of a batch, in key order. `is_new`: only a row that was updated has an xmax."""

INSERT_CHECKPOINTS = """
with t as (
    select distinct on (turn_id) *
    from unnest(
        $1::uuid[], $2::uuid[], $3::uuid[], $4::uuid[], $5::uuid[], $6::text[], $7::bool[], $8::bool[], $9::text[],
        $10::text[], $11::text[], $12::int[], $13::bytea[], $14::bytea[], $15::bigint[], $16::bigint[], $17::bigint[],
        $18::bigint[], $19::text[], $20::float8[], $21::bigint[], $22::bigint[], $23::bytea[], $24::bytea[]
    ) as t (
        turn_id, org_id, agent_id, session_id, request_id, status, is_streaming, is_complete, model,
        provider, provider_request_id, directive_version, messages_sha256, completion_sha256, input_tokens,
        output_tokens, cached_tokens, total_tokens, usage_source, latency_ms, started_us, completed_us, messages,
        completion
    )
),
fresh as (
    select t.*, row_number() over (partition by session_id order by started_us, turn_id) as place,
        count(*) over (partition by session_id) as places
    from t where not exists (select from ibex_core.checkpoints as c where c.turn_id = t.turn_id)
),
counted as (
    update ibex_core.sessions as s set turn_count = s.turn_count + d.places
    from (select session_id, count(*) as places from fresh group by session_id) as d
    where d.session_id = s.session_id
    returning s.session_id, s.turn_count
)
insert into ibex_core.checkpoints (
    turn_id, org_id, agent_id, session_id, turn_index, request_id, status, is_streaming, is_complete, model, provider,
    provider_request_id, directive_version, messages_sha256, completion_sha256, input_tokens, output_tokens,
    cached_tokens, total_tokens, usage_source, latency_ms, started_at, completed_at, messages, completion
)
select
    turn_id, org_id, agent_id, session_id, turn_count - places + place - 1, request_id, status, is_streaming,
    is_complete, model, provider, provider_request_id, directive_version, messages_sha256, completion_sha256,
    input_tokens, output_tokens, cached_tokens, total_tokens, usage_source, latency_ms,
    timestamptz 'epoch' + started_us * interval '1 microsecond',
    timestamptz 'epoch' + completed_us * interval '1 microsecond', messages, completion
from fresh join counted using (session_id)
returning turn_id
"""
"""Counts what is new on in its sessions and writes it, in order of arrival and within a batch in order of start."""

KNOWN_PARENTS = """
select place, coalesce(o.status <> 'erasing', false) as has_org, a.agent_id is not null as has_agent
from unnest($1::uuid[], $2::uuid[]) with ordinality as t (org_id, agent_id, place)
left join ibex_core.organizations as o on o.org_id = t.org_id
left join ibex_core.agents as a on a.org_id = t.org_id and a.agent_id = t.agent_id
"""
"""An organization under erasure counts as gone: its agents are, or soon will be."""

ABANDON = """
update ibex_core.sessions set status = 'abandoned'
where session_id in (
    select session_id from ibex_core.sessions
    where status = 'active' and last_turn_at < clock_timestamp() - $1::interval
    limit $2 for update skip locked
)
returning session_id
"""
"""Skips sessions a recorder holds: those are not idle."""

PRUNE_CHECKPOINTS = "select checkpoints, sessions, passed_over from ibex_core.prune_checkpoints($1, $2)"

LIST_SESSIONS = """
select external_id, org_id, agent_id, status, turn_count, created_at, last_turn_at, session_id
from ibex_core.sessions
where ($1::uuid is null or org_id = $1) and ($2::uuid is null or agent_id = $2) and ($3::text is null or status = $3)
order by last_turn_at desc, session_id limit $4
"""

SHOW_SESSION = """
select s.* from ibex_core.agents as a
join ibex_core.sessions as s on s.org_id = a.org_id and s.agent_id = a.agent_id and s.external_id = $2
where a.agent_id = $1
"""

SHOW_CHECKPOINTS = "select * from ibex_core.checkpoints where session_id = $1 order by turn_index limit $2"


def session_columns(turns: Sequence[Turn]) -> list[list[object]]:
    """The arguments of UPSERT_SESSIONS."""
    return [
        [turn.session_id for turn in turns],
        [turn.org_id for turn in turns],
        [turn.agent_id for turn in turns],
        [turn.external_id for turn in turns],
        [turn.completed_at for turn in turns],
    ]


def checkpoint_columns(turns: Sequence[Turn]) -> list[list[object]]:
    """The arguments of INSERT_CHECKPOINTS."""
    rows = [
        (
            *(turn.turn_id, turn.org_id, turn.agent_id, turn.session_id, turn.request_id, turn.outcome.value),
            *(turn.is_streaming, turn.is_complete, turn.model, turn.provider, turn.provider_request_id),
            *(turn.directive_version, turn.messages_sha256, turn.completion_sha256, turn.input_tokens),
            *(turn.output_tokens, turn.cached_tokens, turn.total_tokens, turn.usage_source),
            turn.total_latency_ms if turn.provider_latency_ms is None else turn.provider_latency_ms,
            *(turn.started_at, turn.completed_at, turn.messages, turn.completion),
        )
        for turn in turns
    ]
    return [list(column) for column in zip(*rows, strict=True)]
