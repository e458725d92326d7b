"""The reference of the command line, as `write_reference.py` writes it to docs/cli.md."""

import re
from collections.abc import Iterator
from typing import Any

import typer

from ibexctl.app import app

EVERYWHERE = {"--json", "--help"}
"""Options of every command, told once at the page's beginning."""


def describe() -> str:
    """Every command: what it does, its arguments and options, an example."""
    root: Any = typer.main.get_command(app)
    return "\n\n".join(_sections(root, "ibexctl", 2))


def _sections(group: Any, path: str, level: int) -> Iterator[str]:
    """Single commands first, then the families, both in the order of `--help`."""
    families = {name: command for name, command in group.commands.items() if hasattr(command, "commands")}
    for name, command in group.commands.items():
        if name not in families:
            yield _command(command, f"{path} {name}", level)
    for name, family in families.items():
        yield f"{'#' * level} {path} {name}\n\n{_prose(family.help)}"
        yield from _sections(family, f"{path} {name}", level + 1)


def _command(command: Any, path: str, level: int) -> str:
    context = command.context_class(command, info_name=path)
    parts = [f"{'#' * level} {path}", _prose(command.help)]
    usage = " ".join(word for word in command.collect_usage_pieces(context) if word != "[OPTIONS]")
    records = [*command.records(context)["Arguments"], *command.records(context)["Options"]]
    if usage:
        parts.append(f"`{path} {usage}`")
    shown = [(names, text) for names, text in records if not any(name in names for name in EVERYWHERE)]
    if rows := [f"- `{' '.join(names.split())}`: {_prose(text)}" for names, text in shown]:
        parts.append("\n".join(rows))
    exits = re.findall(r"^  ([0-9]+)  (.+)$", command.epilog.partition("Example:\n")[0], flags=re.MULTILINE)
    if exits:
        parts.append("Exit codes: " + " · ".join(f"{code} {meaning}" for code, meaning in exits))
    example = re.sub(r"^  ", "", command.epilog.partition("Example:\n")[2], flags=re.MULTILINE)
    parts.append(f"```console\n{example}\n```")
    return "\n\n".join(parts)


def _prose(text: str | None) -> str:
    """A help text on one line a paragraph."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in (text or "").split("\n\n"))
