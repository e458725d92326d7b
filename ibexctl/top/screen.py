"""A sample as a screen: panels and tables of rich, as many rows as the terminal has."""

from collections import deque
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.layout import Layout
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ibexctl.charts import bar, sparkline
from ibexctl.output import printable
from ibexctl.status import format_bytes, format_span
from ibexctl.top.sample import Latency, Leader, Process, Sample

HISTORY = 240
"""As many samples the line of requests shows at most."""
_COLOURS = {"ok": "green", "degraded": "yellow", "unhealthy": "red", "unreachable": "red"}
_PANELS_HEIGHT = 6
_LEADERS_HEIGHT = 5
_NOTHING = "–"
_PROCESS_COLUMNS = (
    ("process", False), ("pid", True), ("cpu", True), ("", False), ("memory", True), ("up", True), ("restarts", True),
    ("in flight", True),
)  # fmt: skip
_LEADER_COLUMNS = (
    ("organization", False), ("turns", True), ("", False), ("tokens", True), ("errors", True), ("p50 ms", True)
)  # fmt: skip
"""Names, and whether numbers stand below them; the one without a name is the bar's."""


class Screen:
    """The screen of a run; it remembers the requests per second for their line."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._requests: deque[float] = deque(maxlen=HISTORY)
        self._latest: Sample | None = None

    def take(self, sample: Sample) -> None:
        """Show this sample from now on."""
        self._latest = sample
        if sample.seconds:
            self._requests.append(sample.traffic.requests)

    def render(self, width: int, height: int, *, trouble: str | None = None) -> RenderableType:
        """The screen for a terminal of this size; `trouble` says why there is no newer sample."""
        sample = self._latest
        if sample is None:
            return Text(trouble or "Looking at the node …")
        room = height - 4 - _PANELS_HEIGHT
        processes = max(2, min(len(sample.processes) + 1, room - _LEADERS_HEIGHT))
        layout = Layout()
        layout.split_column(
            Layout(_head(sample, width, trouble), size=1),
            Layout(self._panels(sample, width), size=_PANELS_HEIGHT),
            Layout(_health(sample, width), size=2),
            Layout(_processes(sample.processes, processes - 1, width), size=processes),
            Layout(_leaders(sample, room - processes, width)),
            Layout(self._foot(sample), size=1),
        )
        return layout

    def _panels(self, sample: Sample, width: int) -> Table:
        grid = Table.grid(expand=True)
        for ratio in (30, 26, 24):
            grid.add_column(ratio=ratio)
        inner = width * 30 // 80 - 4
        line = sparkline(list(self._requests)[-inner:])
        grid.add_row(_traffic(sample, line), _latencies(sample), _memory(sample))
        return grid

    def _foot(self, sample: Sample) -> Text:
        said = f" q quits · every {self._interval:g} s"
        if sample.seconds:
            said += f" · rates over {sample.seconds:.0f} s · organizations over a minute"
        return Text(said, style="dim", no_wrap=True, overflow="ellipsis")


def _head(sample: Sample, width: int, trouble: str | None) -> Text:
    facts = (
        sample.url.removeprefix("http://"),
        sample.env,
        f"up {format_span(sample.uptime_seconds)}",
        sample.upstream,
    )
    left = Text.assemble((f" ibex {sample.version}", "bold"), "  ", "  ".join(facts))
    state = "unreachable" if trouble else sample.state
    right = Text.assemble((f"● {trouble or state} ", _COLOURS.get(state, "red")), f"{sample.at:%H:%M:%S}Z ")
    room = width - right.cell_len
    left.truncate(max(room - 1, 0), overflow="ellipsis", pad=True)
    return Text.assemble(left, " " * max(room - left.cell_len, 0), right, no_wrap=True, overflow="crop")


def _panel(title: str | Text, body: RenderableType) -> Panel:
    return Panel(body, title=title, title_align="left", border_style="dim", height=_PANELS_HEIGHT, padding=(0, 1))


def _traffic(sample: Sample, line: str) -> Panel:
    traffic = sample.traffic
    by_rate = sorted(traffic.errors.items(), key=lambda error: -error[1])
    errors = "  ".join(f"{status} {_rate(rate)}" for status, rate in by_rate)
    under_way = f"{traffic.in_flight:,} in flight"
    if traffic.open_streams is not None:
        under_way += f", {traffic.open_streams:,} streams"
    requests = f"{traffic.requests:,.{0 if traffic.requests >= 10 else 1}f}"
    tokens = f"tokens/s {_rate(traffic.input_tokens)} in {_rate(traffic.output_tokens)} out"
    body = Group(
        Text(line, style="cyan", no_wrap=True, overflow="crop", justify="right"),
        Text(under_way, no_wrap=True, overflow="ellipsis"),
        Text(errors or "no errors", style="red" if errors else "dim", no_wrap=True, overflow="ellipsis"),
        Text(tokens, style="dim", no_wrap=True, overflow="ellipsis"),
    )
    return _panel(Text.assemble("requests ", (f"{requests}/s", "bold")), body)


def _latencies(sample: Sample) -> Panel:
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(style="dim", no_wrap=True, ratio=1)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_row("", Text("p50", style="dim"), Text("p99 ms", style="dim"))
    named = {"request": "request", "overhead": "ibex adds", "first_byte": "first byte"}
    for name, latency in sample.latency.items():
        table.add_row(named.get(name, name), *_quantiles(latency, is_bold=name == "overhead"))
    return _panel("latency", table)


def _quantiles(latency: Latency, *, is_bold: bool) -> tuple[Text, Text]:
    style = "bold" if is_bold else ""
    return Text(_ms(latency.p50_ms), style=style), Text(_ms(latency.p99_ms), style=style)


def _memory(sample: Sample) -> Panel:
    limits = sample.limits
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(justify="right", no_wrap=True, ratio=1)
    grid.add_row("auth", _share(sample.caches.auth))
    grid.add_row("directives", _share(sample.caches.directive))
    grid.add_row("denied/s", Text(_rate(limits.denied), style="yellow" if limits.denied else ""))
    grid.add_row("no redis/s", Text(_rate(limits.redis_errors), style="red" if limits.redis_errors else ""))
    return _panel("caches and limits", grid)


def _health(sample: Sample, width: int) -> Group:
    checks = Text(" ", no_wrap=True, overflow="ellipsis")
    for check in sample.checks:
        took = "" if not round(check.latency_ms or 0.0) else f" {check.latency_ms:.0f} ms"
        checks.append("● ", _COLOURS.get(check.status, "red"))
        said = took if check.status == "ok" else f": {check.message or check.status}"
        checks.append(f"{check.name}{said}  ")
    if not sample.checks:
        checks.append("● /ready does not answer", "red")
    journal = sample.journal
    parts = [
        f"{journal.pending_turns:,} turns wait",
        f"oldest {format_span(journal.oldest_seconds)}",
        f"{format_bytes(journal.bytes)} of {format_bytes(journal.max_bytes)}",
    ]
    if journal.dead_letters:
        parts.append(f"{journal.dead_letters:,} refused")
    share = journal.bytes / journal.max_bytes if journal.max_bytes else 0.0
    line = Text.assemble((" journal ", "dim"), " · ".join(parts), "  ", no_wrap=True, overflow="ellipsis")
    room = max(width - line.cell_len - 2, 0)
    line.append(bar(share, 1.0, min(room, 20)), "red" if share >= 1 else "yellow" if share >= 0.8 else "green")
    return Group(checks, line)


def _table(columns: Sequence[tuple[str, bool]], widest: int) -> Table:
    table = Table(box=None, expand=True, pad_edge=True, padding=(0, 1), header_style="reverse cyan")
    for number, (name, is_number) in enumerate(columns):
        table.add_column(
            name, justify="right" if is_number else "left", no_wrap=True, overflow="ellipsis",
            ratio=1 if number == widest else None,
        )  # fmt: skip
    return table


def _processes(processes: Sequence[Process], room: int, width: int) -> Table:
    columns = (
        ("process", False),
        ("pid", True),
        ("cpu", True),
        ("", False),
        ("memory", True),
        ("up", True),
        ("restarts", True),
        ("in flight", True),
    )
    table = _table(columns, 3)
    shown = processes if len(processes) <= room else sorted(processes, key=lambda one: (one.is_up, -(one.cpu or 0.0)))
    for process in shown[:room]:
        cpu = _NOTHING if process.cpu is None else f"{process.cpu:.0%}"
        table.add_row(
            process.name,
            str(process.pid or "down"),
            cpu,
            Text(bar(process.cpu or 0.0, 1.0, min(max(width - 74, 4), 40)), style="cyan"),
            format_bytes(process.memory_bytes),
            format_span(process.uptime_seconds),
            Text(str(process.restarts), style="yellow" if process.restarts else "dim"),
            "" if process.in_flight is None else f"{process.in_flight:,}",
            style="" if process.is_up else "red",
        )
    return table


def _leaders(sample: Sample, room: int, width: int) -> RenderableType:
    columns = (
        ("organization", False),
        ("turns", True),
        ("", False),
        ("tokens", True),
        ("errors", True),
        ("p50 ms", True),
    )
    table = _table(columns, 2)
    leaders = sample.leaders or []
    for leader in leaders[: max(room - 1, 0)]:
        table.add_row(*_leader(leader, leaders[0].turns, min(max(width - 62, 8), 60)))
    if leaders:
        return table
    missing = sample.leaders_missing
    said = Text(f" {missing}" if missing else " No turn in the last minute.", style="red" if missing else "dim")
    return Group(table, said)


def _leader(leader: Leader, most: int, room: int) -> tuple[str | Text, ...]:
    return (
        printable(leader.name),
        f"{leader.turns:,}",
        Text(bar(leader.turns, most, room), style="cyan"),
        f"{leader.tokens:,}",
        Text(f"{leader.errors:,}", style="red" if leader.errors else "dim"),
        _ms(leader.p50_ms),
    )


def _ms(value: float | None) -> str:
    if value is None:
        return _NOTHING
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _rate(value: float) -> str:
    if value >= 1000:
        return f"{value / 1000:,.1f}k"
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"


def _share(value: float | None) -> str:
    return _NOTHING if value is None else f"{value * 100:.3g} %"
