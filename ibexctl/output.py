"""What a command says: one JSON object for programs, tables for people, plain text for pipes; all else on stderr."""

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from enum import Enum
from typing import TextIO
from uuid import UUID

from ibex.errors import OperatorError


class OutputFailed(OperatorError):
    """Standard output could not be written; nothing more can be said there."""


@dataclass(frozen=True, slots=True)
class Fields:
    """Facts about one thing, a line each: name and value."""

    facts: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under named columns; `empty` is what a person reads when there is no row."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    empty: str = "Nothing there."


View = str | Fields | Table

_WIDEST = 2000
"""Columns a table may take (characters); beyond, cells are cut."""
_TOKEN_SECRET = re.compile(r"(ibex_pat_[0-9a-fA-F-]{36})_[\w-]+")


@dataclass(frozen=True, slots=True)
class Answer:
    """The outcome of a command: the JSON object of `--json`, what people see instead, and the exit code."""

    data: Mapping[str, object]
    views: Sequence[View] = ()
    """Shown in order when `--json` is absent; none: the data's own fields."""
    notes: Sequence[str] = field(default=())
    """Lines for people alone, on stderr even when stdout is piped: what to do next."""
    exit_code: int = 0


def show(answer: Answer, *, is_json: bool) -> None:
    """Print an answer: the object alone on stdout, or its views. Raises OutputFailed."""
    with _writing():
        if is_json:
            sys.stdout.write(encode(answer.data) + "\n")
        else:
            for view in answer.views or (Fields(answer.data),):
                _show_view(view)
        sys.stdout.flush()
    if not is_json:
        for line in answer.notes:
            note(line)


def show_error(message: str, hint: str | None, *, is_json: bool) -> None:
    """Print what went wrong and what to do next: as the one JSON object, or on stderr. Raises OutputFailed.

    A token that was given where an id belongs is quoted by its prefix alone: errors end up in logs.
    """
    message = _TOKEN_SECRET.sub(r"\1_…", message)
    if is_json:
        with _writing():
            sys.stdout.write(encode({"error": {"message": message, "hint": hint}}) + "\n")
            sys.stdout.flush()
        return
    first, *more = printable(message, keep_lines=True).splitlines() or [""]
    lines = [f"error: {first}", *(f"       {line}" for line in more)]
    if hint:
        lines.append(f" hint: {printable(hint)}")
    sys.stderr.write("\n".join(lines) + "\n")


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputFailed(
            f"Standard output cannot be written: {error.strerror}.", hint="What the command did is done all the same."
        ) from error


def note(line: str) -> None:
    """Say something beside the answer: progress, a warning, what to do next. It never reaches stdout."""
    sys.stderr.write(printable(line, keep_lines=True) + "\n")
    sys.stderr.flush()


def encode(data: object) -> str:
    """JSON on one line: UUIDs as text, times as RFC 3339 UTC with milliseconds, bytes as hex."""
    return json.dumps(_plain(data), ensure_ascii=False)


def format_time(moment: datetime) -> str:
    """RFC 3339 in UTC with milliseconds: `2026-01-31T12:00:00.000Z`."""
    aware = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    return aware.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def printable(text: str, *, keep_lines: bool = False) -> str:
    """A text with its control characters escaped: a stored name must not steer the reader's terminal."""
    kept = "\n" if keep_lines else ""
    return "".join(
        char if char.isprintable() or char in kept else char.encode("unicode_escape").decode() for char in text
    )


def is_terminal(stream: TextIO) -> bool:
    """Whether a person is reading this stream."""
    return stream.isatty()


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, datetime):
        return format_time(value)
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, UUID | date):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def cell(value: object) -> str:
    """A value as people read it: nothing for None, yes and no, lists with commas."""
    plain = _plain(value)
    if plain is None:
        return ""
    if isinstance(plain, bool):
        return "yes" if plain else "no"
    if isinstance(plain, float):
        return f"{plain:,.3f}".rstrip("0").rstrip(".")
    if isinstance(plain, list):
        return ", ".join(cell(item) for item in plain)
    if isinstance(plain, dict):
        return ", ".join(f"{key} {cell(item)}" for key, item in plain.items())
    return printable(str(plain))


def _show_view(view: View) -> None:
    if isinstance(view, str):
        sys.stdout.write(view + "\n")
    elif is_terminal(sys.stdout):
        _show_rich(view)
    else:
        rows = view.facts.items() if isinstance(view, Fields) else (view.columns, *view.rows)
        sys.stdout.writelines("\t".join(cell(value) for value in row) + "\n" for row in rows)


def _show_rich(view: Fields | Table) -> None:
    if isinstance(view, Table) and not view.rows:
        sys.stdout.write(view.empty + "\n")
        return
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    if isinstance(view, Fields):
        table = RichTable.grid(padding=(0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(no_wrap=True)
        rows: Iterable[Sequence[object]] = view.facts.items()
    else:
        table = RichTable(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
        for column in view.columns:
            table.add_column(Text(column), no_wrap=True)
        rows = view.rows
    for row in rows:
        table.add_row(*(Text(cell(value)) for value in row))
    # as wide as the table is: a terminal wraps a whole line so that it can be copied, rich would fold each cell
    Console(file=sys.stdout, highlight=False, width=_WIDEST).print(table)
