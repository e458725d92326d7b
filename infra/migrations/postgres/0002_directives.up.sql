-- What operators tell their agents: immutable numbered versions, and which of them is in force.

create table ibex_core.directive_versions (
    agent_id uuid not null,
    version integer not null check (version > 0),
    org_id uuid not null,
    mode text not null check (mode in ('system_first', 'system_append', 'user_prepend')),
    text text not null check (octet_length(text) between 1 and 32768),
    sha256 bytea not null check (octet_length(sha256) = 32),
    created_at timestamptz not null default clock_timestamp(),
    primary key (agent_id, version),
    unique (org_id, agent_id, version),
    foreign key (org_id, agent_id) references ibex_core.agents (org_id, agent_id)
);

-- An agent without a row here has no directive.
create table ibex_core.directives (
    agent_id uuid primary key,
    org_id uuid not null,
    version integer not null,
    updated_at timestamptz not null default clock_timestamp(),
    foreign key (org_id, agent_id, version) references ibex_core.directive_versions (org_id, agent_id, version)
);

create function ibex_core.refuse_rewriting() returns trigger
    language plpgsql set search_path = ''
    as $$
    begin
        raise exception '% is immutable: write a new version', tg_table_name using errcode = 'restrict_violation';
    end
    $$;
create trigger immutable before update on ibex_core.directive_versions
    for each row execute function ibex_core.refuse_rewriting();

alter table ibex_core.directive_versions enable row level security, force row level security;
alter table ibex_core.directives enable row level security, force row level security;

create policy tenant on ibex_core.directive_versions
    using (org_id = any ((select string_to_array(current_setting('ibex.org_ids', true), ',')::uuid[])::uuid[]))
    with check (org_id = any ((select string_to_array(current_setting('ibex.org_ids', true), ',')::uuid[])::uuid[]));
create policy tenant on ibex_core.directives
    using (org_id = any ((select string_to_array(current_setting('ibex.org_ids', true), ',')::uuid[])::uuid[]))
    with check (org_id = any ((select string_to_array(current_setting('ibex.org_ids', true), ',')::uuid[])::uuid[]));

create policy operator on ibex_core.directive_versions to ibex_owner using (true) with check (true);
create policy operator on ibex_core.directives to ibex_owner using (true) with check (true);

grant select on ibex_core.directive_versions, ibex_core.directives to ibex_app;
