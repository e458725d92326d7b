"""Every place that says which version this is, and whether they agree; the CHANGELOG's dated entry for it."""

import json
import re
from datetime import date

from infra.gate.programs import ROOT, ctl
from infra.gate.proof import Proof, judge

_PLACES = {
    "infra/helm/ibex/Chart.yaml": r'^appVersion: "?([^"\s]+)',
    "README.md": r"^ibex (\d\S+) serves on",
}
"""Files that name the version, where they are there and name one."""


def read_version() -> str:
    """What ibex/__init__.py says: the source of all others."""
    return _find("ibex/__init__.py", r'^__version__ = "(.+)"') or "none"


async def agree() -> Proof:
    """The package, the command, the API's description, the chart and the README."""
    version = read_version()
    said = {
        "ibexctl version": (await ctl("version"))["version"],
        "docs/openapi.json": json.loads((ROOT / "docs/openapi.json").read_text())["info"]["version"],
    }
    said |= {place: found for place, pattern in _PLACES.items() if (found := _find(place, pattern)) is not None}
    wrong = [f"{place} says {found}" for place, found in said.items() if found != version]
    figure = "; ".join(wrong) or f"{version} in {len(said) + 1} places"
    return judge(not wrong, "ibex/__init__.py against " + ", ".join(said), figure)


async def changelog() -> Proof:
    """The newest entry is this version's and dated, and nothing waits to be released."""
    return judge_changelog((ROOT / "CHANGELOG.md").read_text(), read_version())


def judge_changelog(text: str, version: str) -> Proof:
    """The same of any text."""
    how = "its newest entry is this version's, with a date, and `[Unreleased]` is empty"
    waiting = re.search(r"^## \[Unreleased\]\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    entries = re.findall(r"^## \[(\d[^\]]*)\](?: - (.*))?$", text, flags=re.MULTILINE)
    if not entries or entries[0][0] != version:
        newest = f"the newest entry is {entries[0][0]}'s" if entries else "there is no released entry"
        return judge(False, how, f"{version} has no dated entry: {newest}")
    if not _is_date(entries[0][1]):
        return judge(False, how, f"the entry of {version} has no date")
    if waiting is not None and waiting[1].strip():
        return judge(False, how, "`[Unreleased]` still holds lines")
    return judge(True, how, f"[{version}] - {entries[0][1]}")


def _is_date(text: str) -> bool:
    try:
        return bool(date.fromisoformat(text))
    except ValueError:
        return False


def _find(place: str, pattern: str) -> str | None:
    path = ROOT / place
    found = re.search(pattern, path.read_text(), flags=re.MULTILINE) if path.exists() else None
    return found[1] if found else None
