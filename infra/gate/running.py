"""Runs a checklist: the house's lines while it stands, then the others; whatever goes wrong is a line's failure."""

import asyncio
import re
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from infra.gate.programs import ROOT
from infra.gate.proof import HouseLine, Line, LoneLine, Proof, Result, Status
from infra.gate.site import Site

LINE_SECONDS = 400.0
"""How long one line may take before it has failed."""

OpenSite = Callable[[], AbstractAsyncContextManager[Site]]
Progress = Callable[[str], None]


def say(line: str) -> None:
    """Progress, on standard error."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


async def run(lines: Sequence[Line], open_site: OpenSite, progress: Progress) -> list[Result]:
    """Prove every line; the results in the lines' order. A house that does not start fails all of its lines."""
    proofs: dict[Line, Proof] = {}
    on_house = [line for line in lines if isinstance(line, HouseLine)]
    if on_house:
        try:
            async with open_site() as site:
                for asked in on_house:
                    proofs[asked] = await _attempt(asked, asked.prove(site), progress)
        except Exception as error:  # noqa: BLE001 - whatever keeps a house from standing is what there is to report
            fault = _failure(error)
            proofs = {asked: proofs.get(asked, fault) for asked in on_house}
            progress(f"the house: {fault.figure}")
    for line in lines:
        if isinstance(line, LoneLine):
            proofs[line] = await _attempt(line, line.prove(), progress)
    return [Result(line, proofs[line]) for line in lines]


async def _attempt(line: Line, proving: Awaitable[Proof], progress: Progress) -> Proof:
    begun = time.monotonic()
    try:
        async with asyncio.timeout(LINE_SECONDS):
            proof = await proving
    except Exception as error:  # noqa: BLE001 - a line that cannot be proved has failed, for whatever reason
        proof = _failure(error)
    progress(f"{proof.status.upper():8}{line.title}: {proof.figure} ({time.monotonic() - begun:.1f} s)")
    return proof


def _failure(error: Exception) -> Proof:
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    said = "took too long" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
    return Proof(Status.FAIL, "could not be proved", without_places(said))


def without_places(text: str) -> str:
    """A message on one line, without this machine's directories: reports are published."""
    for place in (str(ROOT), str(Path.home()), tempfile.gettempdir()):
        text = re.sub(rf"{re.escape(place)}(?=[/\s:'\"]|$)[\w./-]*", "…", text) if place != "/" else text
    return " ".join(text.split())[:400]
