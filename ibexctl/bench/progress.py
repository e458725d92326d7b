"""What a person sees of a running benchmark: a bar on a terminal, else a line for each part, on standard error."""

import sys

from ibexctl.output import is_terminal, note

_WIDTH = 30


class Progress:
    """The parts of a run, one after the other."""

    def __init__(self) -> None:
        self._title = ""
        self._seconds = 0.0
        self._has_bar = is_terminal(sys.stderr)

    def begin(self, title: str, seconds: float = 0.0) -> None:
        """Start a part, which takes so long."""
        self.end()
        self._title, self._seconds = title, seconds
        if not self._has_bar:
            note(f"{title} …" if not seconds else f"{title}, {seconds:g} s …")

    def show(self, second: float, said: str = "") -> None:
        """How far the part is."""
        if self._has_bar and self._seconds:
            done = min(1.0, second / self._seconds)
            bar = "█" * round(done * _WIDTH) + "·" * (_WIDTH - round(done * _WIDTH))
            sys.stderr.write(
                f"\r\x1b[K{self._title} {bar} {min(second, self._seconds):.0f}/{self._seconds:g} s  {said}"
            )
            sys.stderr.flush()

    def end(self) -> None:
        """Leave the line of the bar."""
        if self._has_bar and self._title and self._seconds:
            sys.stderr.write("\n")
            sys.stderr.flush()
        self._title = ""
