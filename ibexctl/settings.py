"""`ibexctl config`: every setting and where it came from, and whether ibex could serve with them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ibexctl.command import command, group
from ibexctl.output import Answer, Table
from ibexctl.serve import display_dsn

if TYPE_CHECKING:
    from ibex.config import Origin, Settings

app = group("Settings: what they are, and whether they work.")

_EXITS = {0: "ibex could serve, though there may be warnings", 1: "something would keep it from serving"}
_MASK = "**********"
_ADDRESSES = ("_dsn", "_url", "_proxy", "_endpoint")


@command(app, "show", example="ibexctl config show\nibexctl config show --origin")
def show_settings(
    has_origin: Annotated[
        bool, typer.Option("--origin", help="Where each value came from: environment, settings file or default.")
    ] = False,
) -> Answer:
    """Show every setting, secrets masked.

    A setting comes from the environment, else from the file IBEX_ENV_FILE names (default: .env), else from its default.
    """
    from ibex.config import environment_names, find_origins, load_settings, settings_file
    from ibexctl.operation import note_unknown_names

    note_unknown_names()
    settings, origins, file = load_settings(), find_origins(), settings_file()
    found = [
        {
            "name": environment_names(field)[0],
            "value": shown_value(settings, field),
            "origin": {"source": origins[field].source, "name": origins[field].name},
        }
        for field in type(settings).model_fields
    ]
    table = Table(
        ("setting", "value", *(("origin",) if has_origin else ())),
        [
            (row["name"], _written(row["value"]), *((_describe(origin, file),) if has_origin else ()))
            for row, origin in zip(found, origins.values(), strict=True)
        ],
    )
    return Answer({"settings_file": str(file) if file.is_file() else None, "settings": found}, (table,))


def shown_value(settings: "Settings", field: str) -> object:
    """A setting as it may be shown: of a secret address the place alone, of any other secret nothing."""
    from ibex.config import EMBEDDED, Secret

    value = getattr(settings, field)
    is_address = field.endswith(_ADDRESSES)
    if isinstance(value, Secret):
        text = value.get_secret_value()
        return (text if text == EMBEDDED else display_dsn(text)) if is_address else _MASK
    if is_address and isinstance(value, str) and "@" in value:
        return display_dsn(value)
    return str(value) if isinstance(value, Path) else value


def _written(value: object) -> str:
    """A value as one would write it into the environment."""
    if isinstance(value, tuple):
        return ",".join(value)
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _describe(origin: "Origin", file: Path) -> str:
    if origin.name is None:
        return origin.source
    return f"{file if origin.source == 'settings file' else origin.source} ({origin.name})"


@command(app, "check", example="ibexctl config check", exits=_EXITS)
def check_settings() -> Answer:
    """Try what the settings name: each store and its rights, the clocks, the disk, the model provider.

    Changes and starts nothing.
    """
    import asyncio

    from ibex.config import load_settings, reach_loopback_directly
    from ibexctl.checks import FAIL, examine
    from ibexctl.operation import quiet_logging

    settings = load_settings()
    reach_loopback_directly()
    quiet_logging(settings)
    findings = asyncio.run(examine(settings))
    counts = {result: sum(finding.result == result for finding in findings) for result in ("ok", "warn", "fail")}
    rows = [(finding.name, finding.result, finding.detail) for finding in findings]
    verdict = ", ".join(f"{count} {result}" for result, count in counts.items() if count)
    hints = tuple(f" hint ({finding.name}): {finding.hint}" for finding in findings if finding.hint)
    data = {"passed": counts[FAIL] == 0, "findings": [finding.as_data() for finding in findings]}
    views = (Table(("check", "result", "detail"), rows), f"Configuration of {settings.env}: {verdict}")
    return Answer(data, views, hints, exit_code=1 if counts[FAIL] else 0)
