"""`ibexctl demo`: the three commands, their options, their exit codes."""

from typing import Annotated

import typer

from ibexctl.command import command, group
from ibexctl.output import Answer

app = group("Demonstrations: ibex broken on purpose, on a server of its own, and counted.")

_EXITS = {0: "every promise was kept", 1: "one was broken: it says which"}


@command(app, "crash", example="ibexctl demo crash", exits=_EXITS)
def crash(
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="N", min=1, max=600, help="How long the clients ask.")
    ] = 16,
) -> Answer:
    """Kill processes under load, and show that no turn is lost.

    While clients ask, kill -9 hits a worker, then the recorder, then every process at once, stores included. The server
    is started again on the same data, and every turn whose end a client saw is looked for in both stores.

    Promised: none is missing, and none stands there twice.
    """
    from ibexctl.demo.crash import demonstrate

    return demonstrate(seconds).answer()


@command(app, "cut", example="ibexctl demo cut\nibexctl demo cut --at 1000 --step 10", exits=_EXITS)
def cut(
    at: Annotated[
        int | None,
        typer.Option("--at", metavar="BYTE", min=0, help="Show the cut at this byte. Else: at two thirds."),
    ] = None,
    step: Annotated[int, typer.Option("--step", metavar="N", min=1, help="Try every N-th byte.")] = 1,
) -> Answer:
    """Cut a provider's stream at every byte, and show what the client sees.

    The provider breaks the connection off after 0, 1, 2 … bytes of a stream. One cut is shown as it looks without ibex
    and through it; all are judged: the whole events that came, then an error, and no end that looks whole.

    Promised: no client can take a broken stream for a whole one, or gets a torn event.
    """
    from ibexctl.demo.cut import demonstrate

    return demonstrate(at, step).answer()


@command(app, "hang", example="ibexctl demo hang", exits=_EXITS)
def hang(
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="N", min=1, max=600, help="How long the clients ask meanwhile.")
    ] = 10,
) -> Answer:
    """Hang Redis under load, and show that nobody is refused or waits.

    While clients ask, Redis is stopped in its tracks: it takes connections and answers nothing. Meanwhile one client
    asks for more than its limit allows, and a token is revoked.

    Promised: no request fails or waits, no limit is exceeded, and the revoked token is refused within 5 s.
    """
    from ibexctl.demo.hang import demonstrate

    return demonstrate(seconds).answer()
