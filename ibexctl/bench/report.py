"""The result as one HTML file that needs nothing else: tables, and plots as inline SVG."""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import accumulate
from pathlib import Path
from typing import Any

from ibexctl.bench.plots import Line, draw_bars, draw_lines, linear_axis, logarithmic_axis
from ibexctl.bench.verdict import format_figure
from ibexctl.output import cell

_STYLE = """\
:root { color-scheme: light dark; --ink: #1d232b; --paper: #fff; --faint: #d8dde3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ed; --paper: #14181d; --faint: #39424d; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 60rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
td, th { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0;
  border-bottom: 1px solid var(--faint); }
.passed { color: #00795a; } .failed { color: #c0392b; font-weight: 600; }
@media (prefers-color-scheme: dark) { .passed { color: #3fc79a; } .failed { color: #ff7b6b; } }
figure { margin: 1.5rem 0; } figcaption { font-weight: 600; margin-bottom: .3rem; }
svg { width: 100%; height: auto; } svg text { fill: var(--ink); font-size: 12px; } .grid { stroke: var(--faint); }
.legend { margin: .2rem 0; } .legend span { margin-right: 1.2rem; }
.legend i { display: inline-block; width: .8rem; height: .8rem; margin-right: .4rem; }
.wide { overflow-x: auto; }
"""


def write_report(path: Path, data: Mapping[str, Any]) -> None:
    """Write the page. `data` is what `--json` prints."""
    path.write_text(render_report(data), encoding="utf-8")


def render_report(data: Mapping[str, Any]) -> str:
    """The page as text."""
    contenders = [found for found in data["contenders"] if not found["skipped"]]
    verdict = "passed" if data["passed"] else "failed"
    parts = [
        f"<h1>ibex benchmark: {escape(data['scenario'])}</h1>",
        f'<p>{escape(cell(data["at"]))} · <span class="{verdict}">{verdict}</span></p>',
        "<h2>Targets</h2>",
        _table(("target", "measured", "limit", "verdict", "detail"), [_target(found) for found in data["targets"]]),
        "<h2>Side by side</h2>",
        _table(_COLUMNS, [_contender(found) for found in data["contenders"]]),
        *_bars(contenders),
        _distribution(contenders),
        _timeline(contenders),
        *_growth(contenders),
        *_starts(data["starts_seconds"]),
        "<h2>Records</h2>",
        _facts(data["records"] or {"not counted": data["records_skipped"]}),
        "<h2>By the server itself</h2>",
        _facts(data["server"] or {"metrics": "not shown by this server"}),
        "<h2>What was on</h2>",
        _facts(data["features"] or {"unknown": "the server was not started by this benchmark"}),
        "<h2>How it was measured</h2>",
        _facts({**data["machine"], **data["cores"], **data["plan"]}),
    ]
    title = f"ibex benchmark: {escape(data['scenario'])}"
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    body = "".join(parts)
    return f'<!doctype html><html lang="en"><head>{head}<style>{_STYLE}</style></head><body>{body}</body></html>\n'


_COLUMNS = (
    *("contender", "answers/s", "p50 ms", "p95 ms", "p99 ms", "p99.9 ms", "failed"),
    *("CPU µs/request", "CPU µs/event", "KiB/stream", "core used"),
)


def _contender(found: Mapping[str, Any]) -> Sequence[object]:
    if found["skipped"]:
        return (f"{found['title']}: skipped, {found['skipped']}", *[""] * (len(_COLUMNS) - 1))
    latency = found["latency_ms"]
    share = found["cpu_share"]
    return (
        found["title"],
        f"{found['throughput']:,.0f}",
        *(latency[name] for name in ("p50", "p95", "p99", "p99_9")),
        sum(found["failures"].values()),
        found["cpu_us_per_request"],
        found["cpu_us_per_event"],
        "" if found["memory_per_stream_bytes"] is None else f"{found['memory_per_stream_bytes'] / 1024:.1f}",
        "" if share is None else f"{share:.0%}",
    )


def _target(found: Mapping[str, Any]) -> Sequence[object]:
    verdict = {True: "passed", False: "failed", None: "not measured"}[found["passed"]]
    unit = found["unit"]
    measured, limit = f"{format_figure(found['measured'])} {unit}", f"{format_figure(found['limit'])} {unit}"
    return found["name"], measured, f"{found['comparison']} {limit}", verdict, found["detail"]


def _bars(contenders: Sequence[Mapping[str, Any]]) -> list[str]:
    def draw(title: str, unit: str, values: Sequence[float | None]) -> str:
        bars = [
            (number, str(found["title"]), value)
            for number, (found, value) in enumerate(zip(contenders, values, strict=True))
            if value is not None
        ]
        return draw_bars(title, bars, unit) if bars else ""

    return [
        draw("Answers a second", "/s", [found["throughput"] for found in contenders]),
        draw("99th percentile of the latency", "ms", [found["latency_ms"]["p99"] for found in contenders]),
        draw("Processor time a request", "µs", [found["cpu_us_per_request"] for found in contenders]),
        draw("Processor time a stream event", "µs", [found["cpu_us_per_event"] for found in contenders]),
    ]


def _distribution(contenders: Sequence[Mapping[str, Any]]) -> str:
    """The share of answers that had come by each latency."""
    lines = []
    for found in contenders:
        buckets = found["distribution"]
        total = sum(count for _, count in buckets) or 1
        sums = accumulate(count for _, count in buckets)
        lines.append(
            Line(found["title"], [(at, 100 * seen / total) for (at, _), seen in zip(buckets, sums, strict=True)])
        )
    x = logarithmic_axis("latency (ms)", [at for line in lines for at, _ in line.points])
    return draw_lines("Share of answers (%) within a latency", lines, x, linear_axis("%", [92.6]))


def _timeline(contenders: Sequence[Mapping[str, Any]]) -> str:
    lines = [Line(found["title"], list(enumerate(found["timeline"], 1))) for found in contenders if found["timeline"]]
    points = [point for line in lines for point in line.points]
    x = linear_axis("second of the measurement", [at for at, _ in points])
    return draw_lines("Answers in each second", lines, x, linear_axis("/s", [value for _, value in points]))


def _growth(contenders: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the server's processes held during a soak."""
    growth = {process: held for found in contenders for process, held in found["growth"].items()}
    if not growth:
        return []
    lines = [
        Line(process, [(second, size / (1 << 20)) for second, size in held["memory_timeline"]])
        for process, held in growth.items()
    ]
    points = [point for line in lines for point in line.points]
    x, y = linear_axis("second", [at for at, _ in points]), linear_axis("MiB", [size for _, size in points])
    rows = [
        (process, name.replace("_", " "), found["first"], found["last"], found["per_minute"])
        for process, held in growth.items()
        for name, found in held.items()
        if name != "memory_timeline"
    ]
    table = _table(("process", "what it holds", "first", "last", "growth a minute"), rows)
    beside = {name: told for found in contenders for name, told in found["beside"].items()}
    return [draw_lines("Resident memory (MiB)", lines, x, y), table, "<h2>Loaded beside</h2>", _facts(beside)]


def _starts(starts: Mapping[str, float]) -> list[str]:
    return ["<h2>Starts (s)</h2>", _facts(starts)] if starts else []


def _facts(facts: Mapping[str, object]) -> str:
    return _table((), [(name.replace("_", " "), value) for name, value in facts.items()])


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(_cell(value) for value in row)}</tr>" for row in rows)
    return f'<div class="wide"><table>{f"<tr>{head}</tr>" if head else ""}{body}</table></div>'


def _cell(value: object) -> str:
    kind = f' class="{value}"' if value in ("passed", "failed") else ""
    return f"<td{kind}>{escape(cell(value))}</td>"
