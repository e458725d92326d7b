"""The dashboard of what clients get and how fast, and of the processes that give it."""

from panels import OF_NODES, Dashboard, Panel, level, quantile, rate, series, share

API = "chat|models|model|auth_probe"
REQUESTS = rate("ibex_proxy_requests_total", route=API)
KNOWN = rate("ibex_proxy_auth_cache_hits_total", tier="lru")
UNKNOWN = rate("ibex_proxy_auth_cache_misses_total", tier="lru")
FAULTS = f"({rate('ibex_proxy_errors_total', code='SERVICE_DEGRADED|INTERNAL_ERROR')} or vector(0)) / {REQUESTS}"


def quantiles(name: str, *by: str) -> list[tuple[str, str]]:
    """p50, p95 and p99."""
    tail = "".join(f" {{{{{label}}}}}" for label in by)
    return [(quantile(q, name, by), f"p{round(q * 100)}{tail}") for q in (0.5, 0.95, 0.99)]


PROXY = Dashboard(
    uid="ibex-proxy",
    title="ibex / proxy",
    description="What clients get, how much of their time is ibex's own, and the processes behind it.",
    variables=OF_NODES,
    rows=[
        (
            "Now",
            [
                Panel(
                    "Requests",
                    "Requests to the API a second; health checks and scrapes are not counted.",
                    "reqps",
                    [(REQUESTS, "")],
                    kind="stat",
                    width=4,
                ),
                Panel(
                    "ibex's own faults",
                    "Share of requests that ended in SERVICE_DEGRADED or INTERNAL_ERROR. The objective is 0.1 %.",
                    "percentunit",
                    [(FAULTS, "")],
                    kind="stat",
                    width=4,
                    limit=0.001,
                ),
                Panel(
                    "Overhead p99",
                    "First byte in to first byte out, less the provider's time. The promise is less than 20 ms.",
                    "s",
                    [(quantile(0.99, "ibex_proxy_overhead_seconds"), "")],
                    kind="stat",
                    width=4,
                    limit=0.02,
                ),
                Panel(
                    "Callers known from memory",
                    "Share of look-ups of credentials that cost no store. The promise is more than 90 %.",
                    "percentunit",
                    [(share(KNOWN, UNKNOWN), "")],
                    kind="stat",
                    width=4,
                ),
                Panel(
                    "Connections",
                    "Client connections open now.",
                    "short",
                    [(level("ibex_proxy_active_connections"), "")],
                    kind="stat",
                    width=4,
                ),
                Panel(
                    "Processes down",
                    "Processes of all nodes that do not live. The supervisor starts them again.",
                    "short",
                    [(f"count({series('ibex_process_up')} == 0) or vector(0)", "")],
                    kind="stat",
                    width=4,
                    limit=1,
                ),
            ],
        ),
        (
            "What clients get",
            [
                Panel(
                    "Requests by status",
                    "Requests to the API a second by HTTP status; 499 is a client that left before it was answered.",
                    "reqps",
                    [(rate("ibex_proxy_requests_total", ["status_code"], route=API), "{{status_code}}")],
                    is_stacked=True,
                ),
                Panel(
                    "Errors by code",
                    "Requests that ended in an error, and streams that were cut, by the code of docs/errors.md.",
                    "reqps",
                    [(rate("ibex_proxy_errors_total", ["code"]), "{{code}}")],
                    is_stacked=True,
                ),
                Panel(
                    "Requests by route",
                    "Requests a second by route; `unmatched` is a path that does not exist.",
                    "reqps",
                    [(rate("ibex_proxy_requests_total", ["route"]), "{{route}}")],
                    is_stacked=True,
                ),
                Panel(
                    "Rate limit",
                    "Verdicts a second by the scope that decided.",
                    "reqps",
                    [(rate("ibex_proxy_rate_limited_total", ["result", "scope"]), "{{result}} by {{scope}}")],
                ),
                Panel(
                    "Streams by their end",
                    "Streams a second by how they ended.",
                    "reqps",
                    [(rate("ibex_proxy_stream_duration_seconds", ["status"], suffix="_count"), "{{status}}")],
                    is_stacked=True,
                ),
                Panel(
                    "Idempotency keys",
                    "Requests with an Idempotency-Key a second by what became of it.",
                    "reqps",
                    [(rate("ibex_proxy_idempotency_total", ["result"]), "{{result}}")],
                ),
            ],
        ),
        (
            "Where the time goes",
            [
                Panel(
                    "Overhead",
                    "ibex's own share of the time to the first byte.",
                    "s",
                    quantiles("ibex_proxy_overhead_seconds"),
                    limit=0.02,
                ),
                Panel(
                    "Overhead, JSON and streams apart",
                    "The p99 of each.",
                    "s",
                    [(quantile(0.99, "ibex_proxy_overhead_seconds", ["stream"]), "p99 stream={{stream}}")],
                    limit=0.02,
                ),
                Panel(
                    "Whole requests",
                    "From the first byte in to the last byte out, streams to their end, by route.",
                    "s",
                    [(quantile(0.95, "ibex_proxy_request_duration_seconds", ["route"], route=API), "p95 {{route}}")],
                ),
                Panel("Authentication", "Who is asking.", "s", quantiles("ibex_proxy_auth_duration_seconds")),
                Panel(
                    "Directive",
                    "Finding the instruction in force.",
                    "s",
                    quantiles("ibex_proxy_directive_resolve_duration_seconds"),
                ),
                Panel(
                    "Event loop lag",
                    "How late workers come to what is due: every request waits as long.",
                    "s",
                    quantiles("ibex_event_loop_lag_seconds"),
                    limit=0.05,
                ),
            ],
        ),
        (
            "Processes",
            [
                Panel(
                    "Restarts",
                    "Processes started again because they ended unasked, in the window on screen.",
                    "short",
                    [
                        (
                            f"sum by (process) (increase({series('ibex_process_restarts_total')}[$__range]))",
                            "{{process}}",
                        )
                    ],
                ),
                Panel(
                    "Waits for slow clients",
                    "How often a stream waited for its client, a second.",
                    "ops",
                    [(rate("ibex_proxy_stream_backpressure_events_total"), "waits")],
                ),
                Panel(
                    "Versions",
                    "Nodes by the version they run.",
                    "short",
                    [(f"count by (version) ({series('ibex_build_info')})", "{{version}}")],
                ),
            ],
        ),
    ],
)
