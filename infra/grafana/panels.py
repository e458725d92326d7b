"""Panels and dashboards as data, and the JSON that Grafana reads.

A metric or label that the catalogue does not have raises KeyError here, before any dashboard shows an empty panel.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ibex.telemetry import Metrics

CATALOGUE = {metric.name: metric for metric in Metrics()}

PROMETHEUS = {"type": "prometheus", "uid": "${prometheus}"}
CLICKHOUSE = {"type": "grafana-clickhouse-datasource", "uid": "${clickhouse}"}
WIDTH, HEIGHT = 24, 8
"""Of the grid, and of a panel."""


def series(name: str, suffix: str = "", **matchers: str) -> str:
    """A selector of the nodes that are looked at. A matcher's value is a regular expression."""
    metric = CATALOGUE[name]
    for label in matchers:
        if label not in metric.label_names:
            raise KeyError(f"{name} has no label {label}")
    conditions = ['instance=~"$instance"', *(f'{label}=~"{value}"' for label, value in matchers.items())]
    return f"{name}{suffix}{{{', '.join(conditions)}}}"


def rate(name: str, by: Sequence[str] = (), suffix: str = "", **matchers: str) -> str:
    """Events a second of a counter; of a histogram with the suffix `_count` or `_sum`."""
    return f"{_sum(name, by)} (rate({series(name, suffix, **matchers)}[$__rate_interval]))"


def level(name: str, by: Sequence[str] = (), **matchers: str) -> str:
    """A gauge as it stands, summed up."""
    return f"{_sum(name, by)} ({series(name, **matchers)})"


def quantile(q: float, name: str, by: Sequence[str] = (), **matchers: str) -> str:
    """A quantile of a histogram."""
    rates = f"rate({series(name, '_bucket', **matchers)}[$__rate_interval])"
    return f"histogram_quantile({q}, {_sum(name, ('le', *by))} ({rates}))"


def share(part: str, rest: str) -> str:
    """What part of both together the first is."""
    return f"({part}) / ({part} + {rest})"


def _sum(name: str, by: Sequence[str]) -> str:
    unknown = set(by) - {"le", "instance", *CATALOGUE[name].label_names}
    if unknown:
        raise KeyError(f"{name} has no label {unknown}")
    return f"sum by ({', '.join(by)})" if by else "sum"


@dataclass(frozen=True)
class Panel:
    """One panel. `queries` are (expression, legend); with `sql` they are asked of ClickHouse."""

    title: str
    description: str
    unit: str
    """Grafana's name of it: s, ms, reqps, percentunit, short …"""
    queries: Sequence[tuple[str, str]]
    kind: str = "timeseries"
    width: int = 8
    is_stacked: bool = False
    limit: float | None = None
    """A promise: beyond it the panel is red."""
    sql: bool = False
    units: dict[str, str] = field(default_factory=dict)
    """Of single columns of a table."""

    def to_json(self, number: int, x: int, y: int) -> dict[str, Any]:
        """As Grafana has it, at this place of the grid."""
        source = CLICKHOUSE if self.sql else PROMETHEUS
        return {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": self.description,
            "datasource": source,
            "gridPos": {"h": HEIGHT, "w": self.width, "x": x, "y": y},
            "fieldConfig": {"defaults": self._defaults(), "overrides": self._overrides()},
            "options": _OPTIONS[self.kind],
            "targets": [
                {"refId": chr(ord("A") + place), "datasource": source, **self._target(query, legend)}
                for place, (query, legend) in enumerate(self.queries)
            ],
        }

    def _target(self, query: str, legend: str) -> dict[str, Any]:
        if not self.sql:
            return {"expr": query, "legendFormat": legend, "editorMode": "code", "range": True}
        is_series = self.kind == "timeseries"
        return {
            "rawSql": query,
            "editorType": "sql",
            "queryType": "timeseries" if is_series else "table",
            "format": 0 if is_series else 1,
        }

    def _defaults(self) -> dict[str, Any]:
        steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
        if self.limit is not None:
            steps.append({"color": "red", "value": self.limit})
        defaults: dict[str, Any] = {"unit": self.unit, "thresholds": {"mode": "absolute", "steps": steps}}
        if self.kind == "timeseries":
            defaults |= {
                "min": 0,
                "custom": {
                    "fillOpacity": 30 if self.is_stacked else 8,
                    "lineWidth": 1,
                    "showPoints": "never",
                    "stacking": {"mode": "normal" if self.is_stacked else "none", "group": "A"},
                    "thresholdsStyle": {"mode": "off" if self.limit is None else "dashed"},
                },
            }
        return defaults

    def _overrides(self) -> list[dict[str, Any]]:
        return [
            {"matcher": {"id": "byName", "options": name}, "properties": [{"id": "unit", "value": unit}]}
            for name, unit in self.units.items()
        ]


_OPTIONS: dict[str, dict[str, Any]] = {
    "timeseries": {
        "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull", "max"]},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {
        "colorMode": "value",
        "graphMode": "area",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
    },
    "table": {"showHeader": True, "cellHeight": "sm"},
}


@dataclass(frozen=True)
class Dashboard:
    """One dashboard: rows of panels, each under a heading."""

    uid: str
    title: str
    description: str
    rows: Sequence[tuple[str, Sequence[Panel]]]
    variables: Sequence[dict[str, Any]] = ()

    def to_json(self) -> dict[str, Any]:
        """As Grafana imports it, or reads it from its provisioning."""
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.description,
            "tags": ["ibex"],
            "schemaVersion": 39,
            "version": 1,
            "editable": True,
            "graphTooltip": 1,
            "refresh": "30s",
            "time": {"from": "now-3h", "to": "now"},
            "timezone": "browser",
            "templating": {"list": list(self.variables)},
            "links": [{"type": "dashboards", "title": "ibex", "tags": ["ibex"], "asDropdown": True, "keepTime": True}],
            "panels": list(self._place_panels()),
        }

    def _place_panels(self) -> list[dict[str, Any]]:
        placed: list[dict[str, Any]] = []
        y = 0
        for heading, panels in self.rows:
            grid = {"h": 1, "w": WIDTH, "x": 0, "y": y}
            placed.append({"id": len(placed) + 1, "type": "row", "title": heading, "collapsed": False, "gridPos": grid})
            x, y = 0, y + 1
            for panel in panels:
                if x + panel.width > WIDTH:
                    x, y = 0, y + HEIGHT
                placed.append(panel.to_json(len(placed) + 1, x, y))
                x += panel.width
            y += HEIGHT
        return placed


def choose_source(name: str, kind: str) -> dict[str, Any]:
    """A variable for the data source, so that a dashboard works in any Grafana."""
    return {"name": name, "label": name.capitalize(), "type": "datasource", "query": kind}


OF_NODES = (
    choose_source("prometheus", "prometheus"),
    {
        "name": "instance",
        "label": "Node",
        "type": "query",
        "datasource": PROMETHEUS,
        "query": {"query": "label_values(ibex_build_info, instance)", "refId": "nodes"},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    },
)
"""The variables of a dashboard of metrics."""
