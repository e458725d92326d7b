-- What ends: checkpoints by their age, organizations by erasure.

-- Retention goes by the database's clock, which also gives the indexes of a session in this order: what is old in a
-- session is its beginning. Reconciliation finds the checkpoints of a period by it as well.
create index on ibex_core.checkpoints (recorded_at);

-- Deletes the oldest checkpoints that were recorded longer ago than `age`, about `batch` of them, and the sessions of
-- which nothing is left. Of a session always the beginning goes, so that what remains has no gap. A session that a recorder
-- holds is left for later. The owner's function, with the bounds inside it, since the application may let records expire
-- but must not be able to delete what is young.
create function ibex_core.prune_checkpoints(age interval, batch integer, out checkpoints bigint, out sessions bigint)
    language sql volatile security definer set search_path = ''
    begin atomic
        with oldest as (
            select session_id, turn_index from ibex_core.checkpoints
            where recorded_at < clock_timestamp() - greatest(age, interval '1 day')
            order by recorded_at limit least(batch, 10000)
        ), reached as (
            select session_id, max(turn_index) as last_index from oldest group by session_id
        ), held as (
            select s.session_id, s.turn_count, r.last_index
            from ibex_core.sessions as s join reached as r on r.session_id = s.session_id
            for update of s skip locked
        ), pruned as (
            delete from ibex_core.checkpoints as c using held as h
            where c.session_id = h.session_id and c.turn_index <= h.last_index
            returning c.turn_id
        ), emptied as (
            delete from ibex_core.sessions as s using held as h
            where s.session_id = h.session_id and h.turn_count = h.last_index + 1
            returning s.session_id
        )
        select (select count(*) from pruned), (select count(*) from emptied);
    end;
revoke execute on function ibex_core.prune_checkpoints(interval, integer) from public;
grant execute on function ibex_core.prune_checkpoints(interval, integer) to ibex_app;

-- An organization is `erasing` from the moment its erasure begins until its row goes with the last of its rows. Its tokens
-- are refused as those of a suspended one are, and turns that still come are dropped. Last, since the lock on organizations
-- stops every look-up of a caller, and must not last as long as the index takes.
alter table ibex_core.organizations drop constraint organizations_status_check;
alter table ibex_core.organizations add constraint organizations_status_check
    check (status in ('active', 'suspended', 'erasing'));
