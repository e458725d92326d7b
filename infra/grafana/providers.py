"""The dashboard of the model providers: what they are asked, how they answer, and what it costs in tokens."""

from panels import OF_NODES, Dashboard, Panel, quantile, rate

CALLS = rate("ibex_proxy_provider_requests_total", ["provider"])
FAILED = rate("ibex_proxy_provider_requests_total", ["provider"], status_class="5xx|error|timeout")
FAILURES = f"({FAILED} or 0 * {CALLS}) / {CALLS}"


def quantiles(name: str, *qs: float, **matchers: str) -> list[tuple[str, str]]:
    """Quantiles of a histogram, by provider."""
    return [(quantile(q, name, ["provider"], **matchers), f"p{round(q * 100)} {{{{provider}}}}") for q in qs]


PROVIDERS = Dashboard(
    uid="ibex-providers",
    title="ibex / providers",
    description="What the model providers are asked, how fast and how well they answer, and the tokens of it.",
    variables=OF_NODES,
    rows=[
        (
            "Calls",
            [
                Panel(
                    "Calls by answer",
                    "Calls a second, each retry for itself, by the class of the answer's status.",
                    "reqps",
                    [
                        (
                            rate("ibex_proxy_provider_requests_total", ["provider", "status_class"]),
                            "{{provider}} {{status_class}}",
                        )
                    ],
                    is_stacked=True,
                ),
                Panel(
                    "Calls that fail",
                    "Share of calls answered with 5xx, not in time or not at all.",
                    "percentunit",
                    [(FAILURES, "{{provider}}")],
                    limit=0.1,
                ),
                Panel(
                    "Retries",
                    "Calls tried again before the first byte, a second.",
                    "reqps",
                    [(rate("ibex_proxy_provider_retries_total", ["provider"]), "{{provider}}")],
                ),
            ],
        ),
        (
            "Time",
            [
                Panel(
                    "Time to the first byte",
                    "From the request to the first byte of the answer's head.",
                    "s",
                    quantiles("ibex_proxy_provider_ttfb_seconds", 0.5, 0.95, 0.99),
                ),
                Panel(
                    "Whole answers",
                    "From the request to the answer's end.",
                    "s",
                    quantiles("ibex_proxy_provider_duration_seconds", 0.5, 0.95, 0.99),
                ),
                Panel(
                    "The provider or ibex?",
                    "The p95 of the provider's first byte beside the p95 of what ibex adds.",
                    "s",
                    [
                        (quantile(0.95, "ibex_proxy_provider_ttfb_seconds"), "provider"),
                        (quantile(0.95, "ibex_proxy_overhead_seconds"), "ibex"),
                    ],
                ),
            ],
        ),
        (
            "Streams",
            [
                Panel(
                    "Streams by their end",
                    "Streams a second: whole, cut by the provider, left by the client, or refused.",
                    "reqps",
                    [
                        (
                            rate("ibex_proxy_stream_duration_seconds", ["provider", "status"], suffix="_count"),
                            "{{provider}} {{status}}",
                        )
                    ],
                    is_stacked=True,
                ),
                Panel(
                    "How long streams are",
                    "From the request to the end, those that came whole.",
                    "s",
                    quantiles("ibex_proxy_stream_duration_seconds", 0.5, 0.95, status="ok"),
                ),
                Panel(
                    "Streams that broke",
                    "A second, by who broke them off.",
                    "reqps",
                    [
                        (rate("ibex_proxy_stream_upstream_disconnects_total"), "provider"),
                        (rate("ibex_proxy_stream_client_disconnects_total"), "client"),
                    ],
                ),
            ],
        ),
        (
            "Tokens",
            [
                Panel(
                    "Tokens by model",
                    "Language tokens a second. A model that ibex does not know by name is `other`.",
                    "short",
                    [(rate("ibex_proxy_tokens_total", ["model", "direction"]), "{{model}} {{direction}}")],
                    width=12,
                    is_stacked=True,
                ),
                Panel(
                    "Tokens by provider",
                    "Language tokens a second.",
                    "short",
                    [(rate("ibex_proxy_tokens_total", ["provider", "direction"]), "{{provider}} {{direction}}")],
                    width=12,
                    is_stacked=True,
                ),
            ],
        ),
    ],
)
