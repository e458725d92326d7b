"""What a PromQL expression asks of the catalogue: metrics, the labels it matches, and those it groups by."""

import re

from ibex.telemetry import Metrics
from ibex.telemetry.metrics import Counter, Gauge, Histogram

CATALOGUE = {metric.name: metric for metric in Metrics()}
OF_EVERY_SERIES = {"job", "instance"}

_SELECTOR = re.compile(r"\b(ibex_\w+)\s*(?:\{([^}]*)\})?")
_MATCHER = re.compile(r"\s*(\w+)\s*(?:=~|!~|!=|=)")
_GROUPING = re.compile(r"\b(?:by|on|without|ignoring)\s*\(([^)]*)\)")


def find_faults(expression: str) -> list[str]:
    """What of it the catalogue does not have."""
    faults: list[str] = []
    known = set(OF_EVERY_SERIES)
    for name, matchers in _SELECTOR.findall(expression):
        metric = _find_metric(name)
        if metric is None:
            faults.append(f"there is no metric {name}")
            continue
        labels = {*metric.label_names, *OF_EVERY_SERIES, *(("le",) if name.endswith("_bucket") else ())}
        known |= labels
        matched = {found[1] for part in matchers.split(",") if (found := _MATCHER.match(part))}
        faults += [f"{name} has no label {label}" for label in sorted(matched - labels)]
    for grouping in _GROUPING.findall(expression):
        labels = {label.strip() for label in grouping.split(",") if label.strip()}
        faults += [f"nothing has the label {label}" for label in sorted(labels - known)]
    return faults


def _find_metric(name: str) -> Counter | Gauge | Histogram | None:
    metric = CATALOGUE.get(name)
    if metric is not None:
        return metric if metric.kind != "histogram" else None
    base = CATALOGUE.get(re.sub(r"_(bucket|count|sum)$", "", name))
    return base if base is not None and base.kind == "histogram" else None
