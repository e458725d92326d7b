-- Conversations and the turns kept of them. Times beyond the year 9999 are refused: clients could not read them.

-- session_id is the uuid5 of (org_id, agent_id, external_id), so every process knows it without asking. No index holds
-- last_turn_at, so that the update of each turn stays within its page (HOT).
create table ibex_core.sessions (
    session_id uuid primary key,
    org_id uuid not null,
    agent_id uuid not null,
    external_id text not null check (external_id ~ '^[A-Za-z0-9._:-]{1,64}$'),
    status text not null default 'active' check (status in ('active', 'abandoned')),
    turn_count integer not null default 0 check (turn_count >= 0),
    created_at timestamptz not null default clock_timestamp(),
    last_turn_at timestamptz not null check (last_turn_at < '9999-01-01Z'),
    unique (org_id, agent_id, external_id),
    unique (org_id, agent_id, session_id),
    foreign key (org_id, agent_id) references ibex_core.agents (org_id, agent_id)
) with (fillfactor = 80);
create index on ibex_core.sessions (org_id) where status = 'active';

-- turn_index counts from 0 in the order of arrival. Unknown token counts are null, never 0. messages and completion hold
-- what the client and the provider sent, byte for byte, and only with content capture.
create table ibex_core.checkpoints (
    turn_id uuid primary key,
    org_id uuid not null,
    agent_id uuid not null,
    session_id uuid not null,
    turn_index integer not null check (turn_index >= 0),
    request_id uuid not null,
    status text not null check (status in ('ok', 'incomplete', 'client_disconnect')),
    is_streaming boolean not null,
    is_complete boolean not null,
    model text not null,
    provider text not null,
    provider_request_id text,
    directive_version integer,
    messages_sha256 bytea not null check (octet_length(messages_sha256) = 32),
    completion_sha256 bytea check (octet_length(completion_sha256) = 32),
    input_tokens bigint check (input_tokens >= 0),
    output_tokens bigint check (output_tokens >= 0),
    cached_tokens bigint check (cached_tokens >= 0),
    total_tokens bigint check (total_tokens >= 0),
    usage_source text not null check (usage_source in ('provider', 'none')),
    latency_ms double precision not null check (latency_ms >= 0),
    started_at timestamptz not null check (started_at < '9999-01-01Z'),
    completed_at timestamptz not null check (completed_at < '9999-01-01Z'),
    recorded_at timestamptz not null default clock_timestamp(),
    messages bytea,
    completion bytea,
    unique (session_id, turn_index),
    foreign key (org_id, agent_id, session_id) references ibex_core.sessions (org_id, agent_id, session_id)
);

alter table ibex_core.sessions enable row level security, force row level security;
alter table ibex_core.checkpoints enable row level security, force row level security;

create policy tenant on ibex_core.sessions
    using (org_id = any ((select string_to_array(current_setting('ibex.org_ids', true), ',')::uuid[])::uuid[]))
    with check (org_id = any ((select string_to_array(current_setting('ibex.org_ids', true), ',')::uuid[])::uuid[]));
create policy tenant on ibex_core.checkpoints
    using (org_id = any ((select string_to_array(current_setting('ibex.org_ids', true), ',')::uuid[])::uuid[]))
    with check (org_id = any ((select string_to_array(current_setting('ibex.org_ids', true), ',')::uuid[])::uuid[]));

create policy operator on ibex_core.sessions to ibex_owner using (true) with check (true);
create policy operator on ibex_core.checkpoints to ibex_owner using (true) with check (true);

grant select, insert, update on ibex_core.sessions, ibex_core.checkpoints to ibex_app;
