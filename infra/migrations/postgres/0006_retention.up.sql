-- Checkpoints end by their age, which is the database's to tell, and the owner's to bound.

-- The application neither gives nor changes the moment at which a checkpoint was recorded, nor a checkpoint at all once it
-- is written.
revoke insert, update on ibex_core.sessions, ibex_core.checkpoints from ibex_app;
grant insert (session_id, org_id, agent_id, external_id, last_turn_at), update (status, turn_count, last_turn_at)
    on ibex_core.sessions to ibex_app;
grant insert (
    turn_id, org_id, agent_id, session_id, turn_index, request_id, status, is_streaming, is_complete, model, provider,
    provider_request_id, directive_version, messages_sha256, completion_sha256, input_tokens, output_tokens,
    cached_tokens, total_tokens, usage_source, latency_ms, started_at, completed_at, messages, completion
) on ibex_core.checkpoints to ibex_app;

-- The one row says how young a checkpoint may be deleted, whatever a node asks for. Only the owner changes it.
create table ibex_core.retention (
    is_only_row boolean primary key default true check (is_only_row),
    least_age interval not null default interval '1 day' check (least_age >= interval '1 day')
);
insert into ibex_core.retention default values;

-- Deletes the oldest checkpoints that were recorded longer ago than `age`, about `batch` of them, and the sessions of
-- which nothing is left. Of a session always the beginning goes, up to the first that is young, so that what remains has
-- no gap: one that a clock set back made to look old waits for those before it. A session that a recorder holds is
-- passed over, and counted, so that "held" is not taken for "nothing old". The owner's function, with the bounds inside
-- it, since the application may let records expire but must not be able to delete what is young.
create function ibex_core.prune_checkpoints(
    age interval, batch integer, out checkpoints bigint, out sessions bigint, out passed_over bigint
)
    language sql volatile security definer set search_path = ''
    begin atomic
        with bound as materialized (
            select clock_timestamp() - greatest(age, interval '1 day', (select least_age from ibex_core.retention)) as at
        ), oldest as (
            select c.session_id, c.turn_index from ibex_core.checkpoints as c
            where c.recorded_at < (select at from bound) and (
                select f.recorded_at from ibex_core.checkpoints as f
                where f.session_id = c.session_id order by f.turn_index limit 1
            ) < (select at from bound)
            order by c.recorded_at limit least(batch, 10000)
        ), reached as (
            select session_id, max(turn_index) as last_index from oldest group by session_id
        ), held as (
            select s.session_id, s.turn_count, r.last_index
            from ibex_core.sessions as s join reached as r on r.session_id = s.session_id
            for update of s skip locked
        ), ended as (
            select h.session_id, h.turn_count, coalesce((
                select min(c.turn_index) from ibex_core.checkpoints as c
                where c.session_id = h.session_id and c.turn_index <= h.last_index
                    and c.recorded_at >= (select at from bound)
            ), h.last_index + 1) as next_index
            from held as h
        ), pruned as (
            delete from ibex_core.checkpoints as c using ended as e
            where c.session_id = e.session_id and c.turn_index < e.next_index
                and c.recorded_at < (select at from bound)
            returning c.turn_id
        ), emptied as (
            -- Counted, since what a recorder has just added is not seen here; looked for, since a count can be wrong.
            delete from ibex_core.sessions as s using ended as e
            where s.session_id = e.session_id and e.turn_count = e.next_index and not exists (
                select from ibex_core.checkpoints as c
                where c.session_id = e.session_id and c.turn_index >= e.next_index
            )
            returning s.session_id
        )
        select (select count(*) from pruned), (select count(*) from emptied),
            (select count(*) from reached) - (select count(*) from held);
    end;
revoke execute on function ibex_core.prune_checkpoints(interval, integer) from public;
grant execute on function ibex_core.prune_checkpoints(interval, integer) to ibex_app;

-- Reconciliation finds the checkpoints of a period by it as well. Last: recorders wait while it is built.
create index on ibex_core.checkpoints (recorded_at);
