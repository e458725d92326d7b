"""Small charts of characters: bars by eighths, and lines of blocks."""

from collections.abc import Sequence

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_BLOCKS = "▁▂▃▄▅▆▇█"


def bar(value: float, largest: float, width: int) -> str:
    """A bar of at most so many characters; something is seen of every value that is not nothing."""
    if largest <= 0 or value <= 0:
        return ""
    eighths = max(1, round(min(value / largest, 1.0) * width * 8))
    full, rest = divmod(eighths, 8)
    return "█" * full + (_EIGHTHS[rest] if rest else "")


def sparkline(values: Sequence[float], largest: float | None = None) -> str:
    """A character for each value, the highest block for the largest; a space where there is nothing."""
    top = max(values, default=0.0) if largest is None else largest
    if top <= 0:
        return " " * len(values)
    return "".join(_block(value / top) for value in values)


def _block(share: float) -> str:
    if share <= 0:
        return " "
    return _BLOCKS[min(int(share * len(_BLOCKS)), len(_BLOCKS) - 1)]
