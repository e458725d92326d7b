"""What the server counted during a run: the difference between two looks at its /metrics."""

import http.client
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from ibexctl.bench.latency import QUANTILES

Samples = Mapping[tuple[str, tuple[tuple[str, str], ...]], float]
"""Values by name and sorted labels."""


def scrape(url: str) -> Samples | None:
    """All samples of a page in Prometheus' text format; None when there is no such page."""
    from prometheus_client.parser import text_string_to_metric_families

    parts = urlsplit(url)
    if not parts.hostname:
        return None
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname, parts.port, timeout=10)
    try:
        connection.request("GET", parts.path or "/metrics")
        response = connection.getresponse()
        text = response.read().decode(errors="replace")
        if response.status != 200:
            return None
        families = list(text_string_to_metric_families(text))
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


@dataclass(frozen=True, slots=True)
class Counted:
    """What was counted between two looks."""

    before: Samples
    after: Samples

    def total(self, name: str, **labels: str) -> float:
        """By how much the series with these labels grew, together. `name` is without `ibex_proxy_`."""
        return sum(value for _, value in self._grown(f"ibex_proxy_{name}", labels))

    def quantiles(self, name: str, **labels: str) -> dict[str, float] | None:
        """Quantiles of a histogram (ms), interpolated within its buckets; None when nothing was observed."""
        buckets: dict[float, float] = {}
        for found, value in self._grown(f"ibex_proxy_{name}_bucket", labels):
            bound = float(found["le"])
            buckets[bound] = buckets.get(bound, 0.0) + value
        cumulative = sorted(buckets.items())
        if not cumulative or not cumulative[-1][1]:
            return None
        return {label: round(_interpolate(cumulative, share) * 1e3, 3) for label, share in QUANTILES.items()}

    def _grown(self, name: str, labels: Mapping[str, str]) -> list[tuple[dict[str, str], float]]:
        wanted = set(labels.items())
        return [
            (dict(key[1]), value - self.before.get(key, 0.0))
            for key, value in self.after.items()
            if key[0] == name and wanted <= set(key[1])
        ]


def _interpolate(cumulative: list[tuple[float, float]], share: float) -> float:
    """As Prometheus' histogram_quantile does; the last bucket has no end, so that its start stands for it."""
    wanted = share * cumulative[-1][1]
    lower, below = 0.0, 0.0
    for bound, count in cumulative:
        if count >= wanted and count > below:
            if bound == float("inf"):
                return lower
            return lower + (bound - lower) * (wanted - below) / (count - below)
        lower, below = bound, count
    return lower
