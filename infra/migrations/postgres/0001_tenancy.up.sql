-- Who there is: organizations, their users, agents, tokens and limits.
--
-- Row security, here and in every later migration: the policy `tenant` shows the rows of the organizations the transaction
-- names in `ibex.org_ids`. Both casts are needed: the inner one alone is a type error, the outer one alone runs per row.
-- Nothing named, nothing seen. FORCE binds the owner too, hence the policy `operator`.

create table ibex_core.organizations (
    org_id uuid primary key,
    name text not null check (char_length(name) between 1 and 200),
    status text not null default 'active' check (status in ('active', 'suspended')),
    created_at timestamptz not null default clock_timestamp()
);

create table ibex_core.users (
    user_id uuid primary key,
    org_id uuid not null references ibex_core.organizations,
    name text not null check (char_length(name) between 1 and 200),
    status text not null default 'active' check (status in ('active', 'suspended')),
    created_at timestamptz not null default clock_timestamp(),
    unique (org_id, user_id)
);

create table ibex_core.agents (
    agent_id uuid primary key,
    org_id uuid not null references ibex_core.organizations,
    name text not null check (char_length(name) between 1 and 200),
    status text not null default 'active' check (status in ('active', 'paused', 'suspended', 'archived')),
    created_at timestamptz not null default clock_timestamp(),
    unique (org_id, agent_id)
);

-- `agent_id` binds a token to one agent; null: it may act for every agent of its organization.
create table ibex_core.tokens (
    token_id uuid primary key,
    org_id uuid not null,
    user_id uuid not null,
    agent_id uuid,
    name text not null check (char_length(name) between 1 and 200),
    prefix text not null,
    digest bytea not null check (octet_length(digest) = 32),
    permissions bigint not null check (permissions between 0 and (1::bigint << 56) - 1),
    created_at timestamptz not null default clock_timestamp(),
    expires_at timestamptz,
    revoked_at timestamptz,
    last_used_at timestamptz,
    foreign key (org_id, user_id) references ibex_core.users (org_id, user_id),
    foreign key (org_id, agent_id) references ibex_core.agents (org_id, agent_id)
);
create index on ibex_core.tokens (org_id, user_id);
create index on ibex_core.tokens (org_id, agent_id) where agent_id is not null;

-- Requests a minute; `agent_id` null: the organization's own limit.
create table ibex_core.limits (
    limit_id uuid primary key,
    org_id uuid not null references ibex_core.organizations,
    agent_id uuid,
    rpm integer not null check (rpm between 1 and 1000000),
    created_at timestamptz not null default clock_timestamp(),
    updated_at timestamptz not null default clock_timestamp(),
    unique nulls not distinct (org_id, agent_id),
    foreign key (org_id, agent_id) references ibex_core.agents (org_id, agent_id)
);

alter table ibex_core.organizations enable row level security, force row level security;
alter table ibex_core.users enable row level security, force row level security;
alter table ibex_core.agents enable row level security, force row level security;
alter table ibex_core.tokens enable row level security, force row level security;
alter table ibex_core.limits enable row level security, force row level security;

create policy tenant on ibex_core.organizations
    using (org_id = any ((select string_to_array(current_setting('ibex.org_ids', true), ',')::uuid[])::uuid[]))
    with check (org_id = any ((select string_to_array(current_setting('ibex.org_ids', true), ',')::uuid[])::uuid[]));
create policy tenant on ibex_core.users
    using (org_id = any ((select string_to_array(current_setting('ibex.org_ids', true), ',')::uuid[])::uuid[]))
    with check (org_id = any ((select string_to_array(current_setting('ibex.org_ids', true), ',')::uuid[])::uuid[]));
create policy tenant on ibex_core.agents
    using (org_id = any ((select string_to_array(current_setting('ibex.org_ids', true), ',')::uuid[])::uuid[]))
    with check (org_id = any ((select string_to_array(current_setting('ibex.org_ids', true), ',')::uuid[])::uuid[]));
create policy tenant on ibex_core.tokens
    using (org_id = any ((select string_to_array(current_setting('ibex.org_ids', true), ',')::uuid[])::uuid[]))
    with check (org_id = any ((select string_to_array(current_setting('ibex.org_ids', true), ',')::uuid[])::uuid[]));
create policy tenant on ibex_core.limits
    using (org_id = any ((select string_to_array(current_setting('ibex.org_ids', true), ',')::uuid[])::uuid[]))
    with check (org_id = any ((select string_to_array(current_setting('ibex.org_ids', true), ',')::uuid[])::uuid[]));

-- The row of the token a caller presents, before anybody knows whose it is.
create policy presented on ibex_core.tokens for select
    using (token_id = (select nullif(current_setting('ibex.token_id', true), '')::uuid));

create policy operator on ibex_core.organizations to ibex_owner using (true) with check (true);
create policy operator on ibex_core.users to ibex_owner using (true) with check (true);
create policy operator on ibex_core.agents to ibex_owner using (true) with check (true);
create policy operator on ibex_core.tokens to ibex_owner using (true) with check (true);
create policy operator on ibex_core.limits to ibex_owner using (true) with check (true);

grant select on ibex_core.organizations, ibex_core.users, ibex_core.agents, ibex_core.tokens, ibex_core.limits to ibex_app;
grant update (last_used_at) on ibex_core.tokens to ibex_app;

-- The sweeper's list of organizations. A function of the owner's, since a second table would have to be kept in step.
create function ibex_core.list_org_ids() returns setof uuid
    language sql stable security definer set search_path = ''
    begin atomic
        select org_id from ibex_core.organizations order by org_id;
    end;
revoke execute on function ibex_core.list_org_ids() from public;
grant execute on function ibex_core.list_org_ids() to ibex_app;
