"""How help reads: commands in sections, their summaries uncut, exit codes and examples at the end."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from typer.core import TyperCommand, TyperGroup

SECTIONS: Mapping[str, Sequence[str]] = {
    "Run a node": ("serve", "recorder", "reload", "status", "top", "config", "migrate"),
    "Who may call": ("org", "user", "agent", "token", "audit"),
    "What agents are told": ("directive",),
    "What was recorded": ("session", "trace", "journal", "reconcile"),
    "Try and measure": ("smoke", "bench", "demo", "version"),
}
"""The commands of the program, in the order of its help."""

_SUMMARY_LENGTH = 1000
"""Longer than any summary: the library would cut them at the end of the line."""


class Leaf(TyperCommand):
    """A command whose arguments are called by their names alone."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The words behind the command's name: `[OPTIONS] ORG`."""
        return [re.sub(r"^\{(.*)\}$", r"\1", piece) for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, then options."""
        for title, rows in self.records(ctx).items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def records(self, ctx: Any) -> dict[str, list[tuple[str, str]]]:
        """Arguments and options, each with its text; of an argument's kind only the choices it has."""
        found: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            name, text = parameter.get_help_record(ctx) or ("", "")
            if name and parameter.param_type_name == "argument":
                found["Arguments"].append((re.sub(r" <[^|>]*>$", "", name), text))
            elif name:
                found["Options"].append((name, text))
        return found


class Family(TyperGroup):
    """A group of commands whose summaries are wrapped, not cut."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands there are, in their sections."""
        sections = list(self.sections(ctx))
        widest = max((len(name) for _, names in sections for name in names), default=0)
        for title, names in sections:
            rows = [(name.ljust(widest), self.commands[name].get_short_help_str(_SUMMARY_LENGTH)) for name in names]
            with formatter.section(title):
                formatter.write_dl(rows)

    def sections(self, ctx: Any) -> Iterable[tuple[str, Sequence[str]]]:
        """Titles, and the names of the commands under each."""
        yield "Commands", [name for name in self.list_commands(ctx) if not self.commands[name].hidden]


class Program(Family):
    """The program itself: its commands by what they are for."""

    def sections(self, ctx: Any) -> Iterable[tuple[str, Sequence[str]]]:
        """SECTIONS, and what is in none of them."""
        there = [name for _, names in super().sections(ctx) for name in names]
        for title, wanted in SECTIONS.items():
            if names := [name for name in wanted if name in there]:
                yield title, names
        if rest := [name for name in there if not any(name in wanted for wanted in SECTIONS.values())]:
            yield "Other commands", rest


def ending(example: str, exits: Mapping[int, str]) -> str:
    """The last paragraphs of a command's help: what its exit codes mean, and how it is called."""
    parts = []
    if exits:
        parts.append("\b\nExit codes:\n" + "\n".join(f"  {code}  {meaning}" for code, meaning in exits.items()))
    parts.append("\b\nExample:\n" + "\n".join(f"  {line}" for line in example.splitlines()))
    return "\n\n".join(parts)
