"""The dashboard of the stores and of the journal: what waits, for whom, and how changes come in."""

from panels import OF_NODES, Dashboard, Panel, level, quantile, rate

STORES = Dashboard(
    uid="ibex-stores",
    title="ibex / stores and journal",
    description="Turns on their way to the stores, the stores themselves, and how changes reach the nodes.",
    variables=OF_NODES,
    rows=[
        (
            "The journal",
            [
                Panel(
                    "Turns that wait",
                    "Turns some store has not taken yet.",
                    "short",
                    [(level("ibex_proxy_journal_pending_turns", ["instance"]), "{{instance}}")],
                ),
                Panel(
                    "The oldest of them",
                    "How long the oldest such turn has waited.",
                    "s",
                    [(level("ibex_proxy_journal_oldest_seconds", ["instance"]), "{{instance}}")],
                    limit=60,
                ),
                Panel(
                    "Nearness to a bound",
                    "Of size, age and free disk the nearest. At 100 % new chats are refused.",
                    "percentunit",
                    [(level("ibex_proxy_journal_pressure_ratio", ["instance"]), "{{instance}}")],
                    limit=0.8,
                ),
                Panel(
                    "Size",
                    "The journal's size on disk.",
                    "bytes",
                    [(level("ibex_proxy_journal_bytes", ["instance"]), "{{instance}}")],
                ),
                Panel(
                    "Dead letters",
                    "Turns put aside because a store refused them for what they are.",
                    "short",
                    [(level("ibex_proxy_journal_dead_letters", ["instance"]), "{{instance}}")],
                    limit=1,
                ),
                Panel(
                    "Stores away",
                    "Processes for which a store is away.",
                    "short",
                    [(level("ibex_store_away", ["store", "instance"]), "{{store}} from {{instance}}")],
                    limit=1,
                ),
            ],
        ),
        (
            "Postgres",
            [
                Panel(
                    "Checkpoints",
                    "Checkpoints delivered a second; a duplicate came a second time and was known.",
                    "ops",
                    [(rate("ibex_proxy_session_checkpoint_total", ["result"]), "{{result}}")],
                    is_stacked=True,
                ),
                Panel(
                    "Transactions",
                    "The p99 of Postgres transactions by what they do.",
                    "s",
                    [(quantile(0.99, "ibex_db_query_duration_seconds", ["operation"]), "{{operation}}")],
                ),
                Panel(
                    "Connections",
                    "Connections of all processes.",
                    "short",
                    [(level("ibex_db_pool_open_connections", ["state"]), "{{state}}")],
                    is_stacked=True,
                ),
                Panel(
                    "Sessions",
                    "Sessions the recorder met a second.",
                    "ops",
                    [(rate("ibex_proxy_session_get_or_create_total", ["result"]), "{{result}}")],
                ),
                Panel(
                    "Sweeper",
                    "Sessions marked a second, and runs that failed.",
                    "ops",
                    [
                        (rate("ibex_proxy_session_sweeper_marked_total", ["status"]), "{{status}}"),
                        (rate("ibex_proxy_session_sweeper_runs_total", result="error"), "failed runs"),
                    ],
                ),
                Panel(
                    "Directives from memory",
                    "Directives found in the cache, not found, and not to be had, a second.",
                    "ops",
                    [
                        (rate("ibex_proxy_directive_cache_hits_total"), "found"),
                        (rate("ibex_proxy_directive_cache_misses_total"), "not found"),
                        (rate("ibex_proxy_directive_resolve_errors_total"), "not to be had"),
                    ],
                ),
            ],
        ),
        (
            "ClickHouse",
            [
                Panel(
                    "Batches",
                    "Batches sent a second.",
                    "ops",
                    [(rate("ibex_clickhouse_flush_total", ["result"]), "{{result}}")],
                    is_stacked=True,
                ),
                Panel(
                    "Time of a batch",
                    "How long ClickHouse takes for a batch.",
                    "s",
                    [
                        (quantile(q, "ibex_clickhouse_flush_duration_seconds"), f"p{round(q * 100)}")
                        for q in (0.5, 0.99)
                    ],
                ),
                Panel(
                    "Rows of a batch",
                    "How many turns travel together.",
                    "short",
                    [(quantile(q, "ibex_clickhouse_flush_rows"), f"p{round(q * 100)}") for q in (0.5, 0.99)],
                ),
            ],
        ),
        (
            "Changes and limits",
            [
                Panel(
                    "Questions for changes",
                    "Each worker asks Postgres once a second what has changed.",
                    "ops",
                    [(rate("ibex_proxy_change_polls_total", ["result"]), "{{result}}")],
                    is_stacked=True,
                ),
                Panel(
                    "From a change to its effect",
                    "How long a revocation takes to be in force. Promised: 250 ms while Redis is up, 5 s in any case.",
                    "s",
                    [(quantile(q, "ibex_proxy_revocation_lag_seconds"), f"p{round(q * 100)}") for q in (0.5, 0.99)],
                    limit=5,
                ),
                Panel(
                    "What changes dropped",
                    "Remembered callers and directives dropped by a change, a second.",
                    "ops",
                    [
                        (rate("ibex_proxy_revocation_invalidate_total"), "callers"),
                        (rate("ibex_proxy_directive_invalidate_total"), "directives"),
                    ],
                ),
                Panel(
                    "Callers in memory",
                    "Verified callers that workers remember, each for itself, and those forgotten for want of room.",
                    "short",
                    [
                        (level("ibex_proxy_auth_cache_lru_size"), "remembered"),
                        (rate("ibex_proxy_auth_cache_lru_evictions_total"), "forgotten a second"),
                    ],
                ),
                Panel(
                    "Redis calls without an answer",
                    "Rate-limit calls a second that Redis did not answer; after three in a row ibex counts itself.",
                    "ops",
                    [(rate("ibex_proxy_rate_limit_redis_errors_total", ["instance"]), "{{instance}}")],
                ),
            ],
        ),
        (
            "What is deleted",
            [
                Panel(
                    "Retention",
                    "Records deleted for their age a second, and runs that failed.",
                    "ops",
                    [
                        (rate("ibex_proxy_retention_deleted_total", ["record"]), "{{record}}"),
                        (rate("ibex_proxy_retention_runs_total", result="error"), "failed runs"),
                    ],
                    width=12,
                ),
                Panel(
                    "Turns of erased organizations",
                    "Turns that came after their organization was erased, and were dropped, a second.",
                    "ops",
                    [(rate("ibex_proxy_erased_turns_dropped_total", ["store"]), "{{store}}")],
                    width=12,
                ),
            ],
        ),
        (
            "Traces",
            [
                Panel(
                    "Spans",
                    "OpenTelemetry spans a second by what became of them.",
                    "ops",
                    [(rate("ibex_otel_spans_total", ["result"]), "{{result}}")],
                    width=24,
                    is_stacked=True,
                ),
            ],
        ),
    ],
)
