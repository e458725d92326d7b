"""Metrics: what one process counts, and the sums over many."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ibex.telemetry import Metrics, merge_snapshots, render_metrics
from ibex.telemetry.metrics import HistogramChild


def read(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of an exposition, as Prometheus' own parser reads it."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_the_node_is_the_sum_of_its_processes() -> None:
    one, other = Metrics(), Metrics()
    one.requests_total.labels("chat", "POST", "200").inc()
    other.requests_total.labels("chat", "POST", "200").inc(2)
    other.requests_total.labels("chat", "POST", "503").inc()
    one.active_connections.set(3)
    other.active_connections.set(4)
    one.overhead_seconds.labels("false").observe(0.0007)
    other.overhead_seconds.labels("false").observe(9.0)

    samples = read(render_metrics([one.snapshot(), other.snapshot()]))

    route = (("method", "POST"), ("route", "chat"), ("status_code", "200"))
    assert samples["ibex_proxy_requests_total", route] == 3
    assert samples["ibex_proxy_active_connections", ()] == 7
    buckets = {
        dict(labels)["le"]: v for (name, labels), v in samples.items() if name == "ibex_proxy_overhead_seconds_bucket"
    }
    assert (buckets["0.0005"], buckets["0.001"], buckets["5.0"], buckets["+Inf"]) == (0, 1, 1, 2)
    assert samples["ibex_proxy_overhead_seconds_sum", (("stream", "false"),)] == pytest.approx(9.0007)


def test_a_bucket_holds_its_own_bound() -> None:
    metrics = Metrics()
    metrics.auth_duration_seconds.observe(0.001)

    samples = read(render_metrics([metrics.snapshot()]))

    assert samples["ibex_proxy_auth_duration_seconds_bucket", (("le", "0.001"),)] == 1
    assert samples["ibex_proxy_auth_duration_seconds_bucket", (("le", "0.0005"),)] == 0


def test_of_the_dead_the_counts_remain_and_the_levels_go() -> None:
    dead, living = Metrics(), Metrics()
    dead.rate_limit_redis_errors_total.inc(5)
    dead.active_connections.set(9)
    living.active_connections.set(1)
    remains = merge_snapshots([dead.snapshot()], with_gauges=False)

    samples = read(render_metrics([remains, living.snapshot()]))

    assert samples["ibex_proxy_rate_limit_redis_errors_total", ()] == 5
    assert samples["ibex_proxy_active_connections", ()] == 1


def test_of_two_versions_shapes_the_later_counts_alone() -> None:
    old, new = Metrics(), Metrics()
    old.auth_duration_seconds.buckets = (1.0,)
    old.auth_duration_seconds._children = {(): HistogramChild((1.0,))}
    old.auth_duration_seconds.observe(0.5)
    new.auth_duration_seconds.observe(0.0007)
    for metrics in (old, new):
        metrics.rate_limit_redis_errors_total.inc()

    samples = read(render_metrics([old.snapshot(), new.snapshot()]))

    assert samples["ibex_proxy_auth_duration_seconds_count", ()] == 1
    assert samples["ibex_proxy_auth_duration_seconds_bucket", (("le", "0.001"),)] == 1
    assert samples["ibex_proxy_rate_limit_redis_errors_total", ()] == 2


def test_a_label_too_few_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="labels"):
        Metrics().requests_total.labels("chat")


def test_names_follow_the_catalogue() -> None:
    for metric in Metrics():
        assert metric.name.startswith("ibex_")
        assert (metric.kind == "counter") == metric.name.endswith("_total")
