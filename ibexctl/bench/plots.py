"""Plots as inline SVG: lines over a linear or a logarithmic axis, and bars side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

WIDTH, HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 12, 44
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")
"""Told apart by most kinds of sight, on light and on dark ground."""


@dataclass(frozen=True, slots=True)
class Line:
    """One contender's points, by their x."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Axis:
    """What an axis shows, from where to where."""

    title: str
    low: float
    high: float
    is_logarithmic: bool = False

    def place(self, value: float, start: float, end: float) -> float:
        """Where a value lies between two pixels."""
        if self.is_logarithmic:
            share = (log10(max(value, self.low)) - log10(self.low)) / (log10(self.high) - log10(self.low))
        else:
            share = (value - self.low) / (self.high - self.low)
        return start + (end - start) * min(max(share, 0.0), 1.0)

    def ticks(self) -> list[float]:
        """Round values, about five of them; powers of ten when logarithmic."""
        if self.is_logarithmic:
            return [10.0**power for power in range(round(log10(self.low)), round(log10(self.high)) + 1)]
        step = 10.0 ** floor(log10((self.high - self.low) / 4))
        step *= next(factor for factor in (1, 2, 5, 10) if (self.high - self.low) / (step * factor) <= 6)
        return [self.low + step * number for number in range(int((self.high - self.low) / step) + 1)]


def linear_axis(title: str, values: Sequence[float]) -> Axis:
    """From zero to a little above the largest."""
    return Axis(title, 0.0, (max(values, default=0.0) or 1.0) * 1.08)


def logarithmic_axis(title: str, values: Sequence[float]) -> Axis:
    """Whole powers of ten around the values."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = floor(log10(min(positive))), ceil(log10(max(positive)))
    return Axis(title, 10.0**low, 10.0 ** max(high, low + 1), is_logarithmic=True)


def draw_lines(title: str, lines: Sequence[Line], x: Axis, y: Axis) -> str:
    """A plot with a legend."""
    shapes = [_grid(x, y)]
    for number, line in enumerate(lines):
        path = " ".join(
            f"{x.place(a, _LEFT, WIDTH - _RIGHT):.1f},{y.place(b, HEIGHT - _BOTTOM, _TOP):.1f}" for a, b in line.points
        )
        colour = _COLOURS[number % len(_COLOURS)]
        shapes.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
    return _figure(title, "".join(shapes), [line.name for line in lines])


def draw_bars(title: str, bars: Sequence[tuple[int, str, float]], unit: str) -> str:
    """A bar for each name, from left to right, the value at its end. A bar's number gives its colour."""
    row, left = 34, 190
    largest = max((value for _, _, value in bars), default=0.0) or 1.0
    shapes = []
    for place, (number, name, value) in enumerate(bars):
        y, width = place * row + 6, (WIDTH - left - 130) * value / largest
        colour = _COLOURS[number % len(_COLOURS)]
        shapes += [
            f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{left}" y="{y}" width="{max(width, 1):.1f}" height="22" fill="{colour}"/>',
            f'<text x="{left + width + 8:.1f}" y="{y + 15}">{_short(value)} {escape(unit)}</text>',
        ]
    return _figure(title, "".join(shapes), [], height=len(bars) * row + 6)


def _grid(x: Axis, y: Axis) -> str:
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    shapes = []
    for tick in x.ticks():
        at = x.place(tick, _LEFT, right)
        shapes.append(f'<line class="grid" x1="{at:.1f}" y1="{_TOP}" x2="{at:.1f}" y2="{bottom}"/>')
        shapes.append(f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{_short(tick)}</text>')
    for tick in y.ticks():
        at = y.place(tick, bottom, _TOP)
        shapes.append(f'<line class="grid" x1="{_LEFT}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}"/>')
        shapes.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_short(tick)}</text>')
    middle = (_LEFT + right) / 2
    shapes.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x.title)}</text>')
    return "".join(shapes)


def _figure(title: str, shapes: str, names: Sequence[str], *, height: int = HEIGHT) -> str:
    legend = "".join(
        f'<span><i style="background:{_COLOURS[number % len(_COLOURS)]}"></i>{escape(name)}</span>'
        for number, name in enumerate(names)
    )
    picture = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">{shapes}</svg>'
    return f'<figure><figcaption>{escape(title)}</figcaption>{picture}<p class="legend">{legend}</p></figure>'


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
