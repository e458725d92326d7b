"""The live screen: a sample each interval until q or Ctrl-C, on a terminal that is left as it was found."""

import asyncio
import contextlib
import os
import signal
import sys
import termios
import tty
from collections.abc import Iterator

from rich.console import Console
from rich.live import Live

from ibex.errors import ServerNotRunning
from ibexctl.top.collector import Collector
from ibexctl.top.screen import Screen

_FIRST_INTERVAL = 1.0
"""After the first look, which has no rates."""
_QUITS = b"qQ"


async def watch(collector: Collector, interval: float) -> None:
    """Look at the node until somebody presses q. Raises ServerNotRunning when there is none at the start."""
    screen, console = Screen(interval), Console()
    screen.take(await collector.look())
    is_over = asyncio.Event()
    with _keys(is_over), Live(console=console, screen=True, auto_refresh=False) as live:
        pause, trouble = min(_FIRST_INTERVAL, interval), None
        while True:
            live.update(screen.render(console.width, console.height, trouble=trouble), refresh=True)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(is_over.wait(), pause)
            if is_over.is_set():
                return
            pause = interval
            try:
                screen.take(await collector.look())
                trouble = None
            except ServerNotRunning:
                trouble = "no server answers"


@contextlib.contextmanager
def _keys(is_over: asyncio.Event) -> Iterator[None]:
    """Keys reach us one by one and unseen; `is_over` is set by one that quits, and by Ctrl-C."""
    terminal, loop = sys.stdin.fileno(), asyncio.get_running_loop()

    def read() -> None:
        pressed = os.read(terminal, 64)
        if not pressed or any(key in pressed for key in _QUITS):
            is_over.set()

    before = termios.tcgetattr(terminal)
    tty.setcbreak(terminal)
    loop.add_reader(terminal, read)
    loop.add_signal_handler(signal.SIGINT, is_over.set)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        loop.remove_reader(terminal)
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
