-- What every process must hear of, and what operators did.

-- Kind and ids only, hence outside row security. The feed's cursor is the transaction id, not the time: a transaction may
-- commit later than any overlap.
create table ibex_core.changes (
    change_id bigint generated always as identity primary key,
    xid xid8 not null default pg_current_xact_id(),
    kind text not null check (kind in ('organization', 'user', 'agent', 'token', 'limit', 'directive')),
    entity_id uuid not null,
    changed_at timestamptz not null default clock_timestamp()
);
create index on ibex_core.changes (xid);
grant select on ibex_core.changes to ibex_app;

-- Arguments: the kind, then the columns of which the first that is not null is the entity's id.
create function ibex_core.note_change() returns trigger
    language plpgsql security definer set search_path = ''
    as $$
    declare
        was jsonb := case when tg_op <> 'INSERT' then to_jsonb(old) end;
        is_now jsonb := case when tg_op <> 'DELETE' then to_jsonb(new) end;
    begin
        insert into ibex_core.changes (kind, entity_id)
        select distinct tg_argv[0], coalesce(r ->> tg_argv[1], r ->> tg_argv[2])::uuid
        from (values (was), (is_now)) as v (r)
        where r is not null;
        return null;
    end
    $$;
revoke execute on function ibex_core.note_change() from public;

create function ibex_core.refuse_truncating() returns trigger
    language plpgsql set search_path = ''
    as $$
    begin
        raise exception 'truncating % tells nobody: delete its rows', tg_table_name using errcode = 'restrict_violation';
    end
    $$;

create trigger changes after insert or delete or update of org_id, status on ibex_core.organizations
    for each row execute function ibex_core.note_change('organization', 'org_id');
create trigger changes after insert or delete or update of user_id, org_id, status on ibex_core.users
    for each row execute function ibex_core.note_change('user', 'user_id');
create trigger changes after insert or delete or update of agent_id, org_id, status on ibex_core.agents
    for each row execute function ibex_core.note_change('agent', 'agent_id');
create trigger changes
    after insert or delete
    or update of token_id, org_id, user_id, agent_id, digest, permissions, expires_at, revoked_at on ibex_core.tokens
    for each row execute function ibex_core.note_change('token', 'token_id');
create trigger changes after insert or delete or update of org_id, agent_id, rpm on ibex_core.limits
    for each row execute function ibex_core.note_change('limit', 'agent_id', 'org_id');
create trigger changes after insert or delete or update of agent_id, org_id, version on ibex_core.directives
    for each row execute function ibex_core.note_change('directive', 'agent_id');

create trigger no_truncate before truncate on ibex_core.organizations execute function ibex_core.refuse_truncating();
create trigger no_truncate before truncate on ibex_core.users execute function ibex_core.refuse_truncating();
create trigger no_truncate before truncate on ibex_core.agents execute function ibex_core.refuse_truncating();
create trigger no_truncate before truncate on ibex_core.tokens execute function ibex_core.refuse_truncating();
create trigger no_truncate before truncate on ibex_core.limits execute function ibex_core.refuse_truncating();
create trigger no_truncate before truncate on ibex_core.directives execute function ibex_core.refuse_truncating();

-- Deletes what is older than 48 h among the oldest `batch` changes. The owner's function, with the age inside it, since the
-- application may prune but must not be able to hide a change from others.
create function ibex_core.prune_changes(batch integer) returns bigint
    language sql volatile security definer set search_path = ''
    begin atomic
        with oldest as (
            select change_id, changed_at from ibex_core.changes order by change_id limit batch
        ), pruned as (
            delete from ibex_core.changes as c using oldest as o
            where c.change_id = o.change_id and o.changed_at < clock_timestamp() - interval '48 hours'
            returning c.change_id
        )
        select count(*) from pruned;
    end;
revoke execute on function ibex_core.prune_changes(integer) from public;
grant execute on function ibex_core.prune_changes(integer) to ibex_app;

-- Who did what, and when; never a secret. Written in the transaction of the deed. No foreign keys: it outlives its subjects.
create table ibex_core.audit_events (
    audit_event_id uuid primary key default gen_random_uuid(),
    org_id uuid,
    actor text not null,
    action text not null,
    entity_kind text not null,
    entity_id uuid not null,
    details jsonb not null default '{}',
    created_at timestamptz not null default clock_timestamp()
);
create index on ibex_core.audit_events (org_id, created_at);

alter table ibex_core.audit_events enable row level security, force row level security;
create policy tenant on ibex_core.audit_events
    using (org_id = any ((select string_to_array(current_setting('ibex.org_ids', true), ',')::uuid[])::uuid[]))
    with check (org_id = any ((select string_to_array(current_setting('ibex.org_ids', true), ',')::uuid[])::uuid[]));
create policy operator on ibex_core.audit_events to ibex_owner using (true) with check (true);
grant select on ibex_core.audit_events to ibex_app;
