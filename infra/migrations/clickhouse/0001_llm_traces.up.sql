-- One row a turn, no content. Runs in the database the DSN names.
-- The deduplication window counts inserted blocks: a batch that is sent again within it, under its token, is stored once.
-- fsync_after_insert: the journal forgets a turn once it is here, so a power loss must not.
create table if not exists llm_traces
(
    turn_id               UUID,
    request_id            UUID,
    org_id                UUID,
    agent_id              UUID,
    session_id            String,
    replay_of             Nullable(UUID),
    directive_version     Nullable(UInt32),
    model                 LowCardinality(String),
    provider              LowCardinality(String),
    is_streaming          Bool,
    input_tokens          Nullable(UInt64),
    output_tokens         Nullable(UInt64),
    cached_tokens         Nullable(UInt64),
    total_tokens          Nullable(UInt64),
    usage_source          LowCardinality(String),
    attempts              UInt16,
    requested_at          DateTime64(3, 'UTC'),
    completed_at          DateTime64(3, 'UTC'),
    auth_latency_us       UInt64,
    rate_limit_latency_us UInt64,
    directive_latency_us  UInt64,
    overhead_latency_us   UInt64,
    provider_ttfb_ms      Nullable(Float64),
    total_latency_ms      Float64,
    status_code           UInt16,
    outcome               LowCardinality(String),
    error_code            LowCardinality(Nullable(String)),
    inserted_at           DateTime64(3, 'UTC') default now64(3),
    index turn_id_bloom turn_id type bloom_filter granularity 4,
    index request_id_bloom request_id type bloom_filter granularity 4
)
engine = MergeTree
partition by toYYYYMM(requested_at)
order by (org_id, agent_id, requested_at)
ttl toDateTime(requested_at) + interval 90 day delete
settings non_replicated_deduplication_window = 10000, fsync_after_insert = 1, fsync_part_directory = 1;
