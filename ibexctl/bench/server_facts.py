"""What a server says of a run: its own figures, and the proof that nothing was switched off for it."""

from typing import TYPE_CHECKING, Any

from ibexctl.bench.scrape import Counted

if TYPE_CHECKING:
    from ibex.config import Settings


def describe_server(counted: Counted) -> dict[str, Any]:
    """Overhead and hit rates as the server counted them."""
    return {
        "overhead_ms": counted.quantiles("overhead_seconds"),
        "overhead_json_ms": counted.quantiles("overhead_seconds", stream="false"),
        "overhead_stream_ms": counted.quantiles("overhead_seconds", stream="true"),
        "auth_ms": counted.quantiles("auth_duration_seconds"),
        "provider_ttfb_ms": counted.quantiles("provider_ttfb_seconds"),
        "auth_hit_rate": _share(
            counted.total("auth_cache_hits_total", tier="lru"), counted.total("auth_cache_misses_total", tier="lru")
        ),
        "directive_hit_rate": _share(
            counted.total("directive_cache_hits_total"), counted.total("directive_cache_misses_total")
        ),
        "chats": counted.total("requests_total", route="chat"),
        "chats_refused": counted.total("requests_total", route="chat")
        - counted.total("requests_total", route="chat", status_code="200"),
        "provider_retries": counted.total("provider_retries_total"),
    }


def describe_features(settings: "Settings", counted: Counted | None, log_bytes: int) -> dict[str, object]:
    """Each feature that costs time, whether it was on, and what shows it."""
    evidence = _evidence(counted) if counted is not None else {}
    spans = f"{settings.otel_sample_ratio:.0%} of requests sampled" + (
        "" if settings.otel_exports else ", no collector"
    )
    return {
        "authentication": evidence.get("authentication", "on"),
        "rate limit": evidence.get("rate limit", "on, in Redis"),
        "directive": evidence.get("directive", "on"),
        "journal": f"on, sync {settings.journal_sync}",
        "recorder": "on, Postgres and ClickHouse embedded",
        "metrics": "on",
        "tracing": spans,
        "access log": f"on, {log_bytes / 1e6:.1f} MB written" if settings.access_log else "OFF",
        "content capture": "on" if settings.capture_content else "off, as by default",
    }


def _evidence(counted: Counted) -> dict[str, object]:
    authenticated = counted.total("auth_duration_seconds_count")
    admitted = counted.total("rate_limited_total", result="allowed")
    errors = counted.total("rate_limit_redis_errors_total")
    found = counted.total("directive_cache_hits_total") + counted.total("directive_cache_misses_total")
    return {
        "authentication": f"on, {authenticated:,.0f} requests authenticated" if authenticated else "OFF",
        "rate limit": f"on, {admitted:,.0f} admitted in Redis, {errors:,.0f} without it" if admitted else "OFF",
        "directive": f"on, {found:,.0f} looked up and woven" if found else "OFF",
    }


def _share(hits: float, misses: float) -> float | None:
    return round(hits / (hits + misses), 5) if hits + misses else None
