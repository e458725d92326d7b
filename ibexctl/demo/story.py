"""How a demonstration is told: lines with the time while it runs, then what was counted and whether promises held."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ibexctl.output import Answer, Fields, View, note


class Story:
    """The lines of a running demonstration, on standard error, each with the seconds since its beginning."""

    def __init__(self) -> None:
        self._began_at = time.monotonic()

    def tell(self, line: str) -> None:
        """Say what is done now."""
        note(f"{time.monotonic() - self._began_at:5.1f} s  {line}")

    def end(self) -> None:
        """Say that nothing is left to be done but to clean up, which takes some seconds."""
        self.tell("Done: stopping the server and removing its data.")
        note("")


@dataclass(frozen=True, slots=True)
class Promise:
    """Something ibex promises, and whether it was kept this time."""

    text: str
    is_kept: bool


@dataclass(frozen=True, slots=True)
class Finding:
    """What a demonstration counted."""

    figures: Mapping[str, object]
    promises: Sequence[Promise]
    exhibits: Sequence[View] = ()
    """What people see before the figures."""
    data: Mapping[str, object] = field(default_factory=dict)
    """What `--json` has besides the figures."""

    def answer(self) -> Answer:
        """As the command says it; a broken promise makes it fail."""
        is_kept = all(promise.is_kept for promise in self.promises)
        told = {name.replace("_", " "): value for name, value in self.figures.items()}
        verdicts = [f"{'kept  ' if promise.is_kept else 'BROKEN'}  {promise.text}" for promise in self.promises]
        promises = [{"promise": promise.text, "is_kept": promise.is_kept} for promise in self.promises]
        return Answer(
            {**self.figures, **self.data, "promises": promises, "is_kept": is_kept},
            (*self.exhibits, Fields(told), "", *verdicts),
            exit_code=0 if is_kept else 1,
        )
