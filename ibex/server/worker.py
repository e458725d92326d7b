"""A worker process: one event loop that serves requests on the sockets its supervisor owns."""

import argparse
import asyncio
import gc
import logging
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from typing import Protocol

from ibex.config import Settings, load_settings
from ibex.errors import IbexError, OperatorError
from ibex.server.control import Control
from ibex.server.handover import Handover
from ibex.server.lifeline import Lifeline
from ibex.server.messages import Unfinished
from ibex.server.process import begin_process, run_process
from ibex.telemetry import Metrics, configure_logging, spawn

log = logging.getLogger("ibex.worker")

GC_THRESHOLDS = (25_000, 20, 50)
"""Requests make few cycles; at Python's 700 objects the collector ran thrice a request's worth of every hundred."""


class Server(Protocol):
    """What serves HTTP (`ibex.server.edge.app.HttpServer`). It closes the sockets it is given."""

    async def start(self, sockets: list[socket.socket]) -> None:
        """Accept connections on these listening sockets."""
        ...

    async def accept_on(self, sock: socket.socket) -> None:
        """Accept connections on this socket too."""
        ...

    async def release(self, sock: socket.socket) -> None:
        """Accept no more on this socket, which `accept_on` was given."""
        ...

    def withdraw(self) -> None:
        """Serve on, and say at /ready that this will end."""
        ...

    @property
    def unfinished(self) -> Unfinished:
        """What has not been answered to the end."""
        ...

    def stop_accepting(self, queued: Iterable[socket.socket]) -> None:
        """Accept nothing more, and take these connections, which nobody has accepted."""
        ...

    async def drain(self, seconds: float) -> None:
        """Return when every request has been answered.

        Idle connections go to the successor when there is one (`Control.has_successor`).
        """
        ...

    async def close(self) -> None:
        """Cut what is left."""
        ...


class Sockets:
    """The listening sockets of all slots, as this worker inherited them.

    The server is given duplicates: it closes what it is given, and a socket may have to be adopted again.
    """

    def __init__(self, inherited: Sequence[socket.socket]) -> None:
        self._inherited = list(inherited)
        self._adopted: dict[int, socket.socket] = {}
        self._one_at_a_time = asyncio.Lock()

    def own(self, slot: int) -> socket.socket:
        """This worker's own."""
        return self._inherited[slot].dup()

    def obey(self, control: Control, server: Server) -> None:
        """Adopt and release as the supervisor says."""

        def adopt(slot: int) -> None:
            _ = spawn(self.adopt(slot, server), name=f"adopt slot {slot}")

        def release(slot: int) -> None:
            _ = spawn(self.release(slot, server), name=f"release slot {slot}")

        control.on_adopt, control.on_release = adopt, release

    async def adopt(self, slot: int, server: Server) -> None:
        """Accept in the place of a worker that is away."""
        async with self._one_at_a_time:
            if slot not in self._adopted and self._inherited:
                self._adopted[slot] = self._inherited[slot].dup()
                await server.accept_on(self._adopted[slot])

    async def release(self, slot: int, server: Server) -> None:
        """Its own worker is back."""
        async with self._one_at_a_time:
            adopted = self._adopted.pop(slot, None)
            if adopted is not None:
                await server.release(adopted)

    def take_queued(self) -> Iterator[socket.socket]:
        """Connections that have been made and that nobody has accepted: with the last listener they would be reset."""
        for sock in self._inherited:
            with suppress(BlockingIOError):
                while True:
                    yield sock.accept()[0]

    def close(self) -> None:
        """Close the inherited ones: with the last process that holds them, the port closes."""
        for sock in self._inherited:
            sock.close()
        self._inherited.clear()


OpenServer = Callable[[Settings, int, Metrics, Control], AbstractAsyncContextManager[Server]]


@asynccontextmanager
async def open_http_server(settings: Settings, slot: int, metrics: Metrics, control: Control) -> AsyncIterator[Server]:
    """The proxy, not yet listening."""
    from ibex.runtime import open_worker
    from ibex.server.edge.app import HttpServer

    async with open_worker(settings, slot=slot, metrics=metrics, neighbours=control) as worker:
        server = HttpServer(worker, control)
        control.read_facts = lambda: {
            "in_flight": server.in_flight,
            "streams": server.streams,
            "journal_pressure": round(worker.journal.pressure, 3),
        }
        yield server


async def serve(
    settings: Settings,
    slot: int,
    control_fd: int,
    sockets: Sockets,
    handover: Handover,
    open_server: OpenServer = open_http_server,
) -> int:
    """Serve until told to end; answers the exit code."""
    metrics = Metrics()
    control = Control(metrics, handover)
    lifeline = Lifeline(control, settings.shutdown_timeout)
    await control.connect(control_fd)
    try:
        async with open_server(settings, slot, metrics, control) as server, AsyncExitStack() as stack:
            sockets.obey(control, server)
            control.on_withdraw = server.withdraw
            stack.push_async_callback(server.close)
            await server.start([sockets.own(slot)])
            reports = spawn(control.report_forever(), name="metrics reports")
            stack.callback(reports.cancel)
            gc.collect()
            gc.freeze()
            gc.set_threshold(*GC_THRESHOLDS)
            control.ready()
            seconds = await lifeline.ended()
            is_hurried = seconds <= 0
            server.stop_accepting(() if control.has_successor or is_hurried else sockets.take_queued())
            sockets.close()
            await lifeline.within(server.drain(seconds))
            confess(control, server.unfinished)
    except OperatorError as error:
        control.fail(error.message, error.hint)
        return 1
    except IbexError as error:
        control.fail(error.message)
        return 1
    finally:
        handover.close()
        await control.close()
    return 0


def confess(control: Control, unfinished: Unfinished) -> None:
    """Tell what the end of the time to drain cuts, if anything."""
    if unfinished.requests or unfinished.streams:
        facts = {"requests": unfinished.requests, "streams": unfinished.streams}
        log.warning("requests were cut at the end of the time to drain", extra=facts)
        control.confess(unfinished)


def main(open_server: OpenServer = open_http_server) -> int:
    """The process's entry: `python -m ibex.server.worker --slot N --listen FD,… --control FD --parent PID`."""
    parser = argparse.ArgumentParser(prog="ibex.server.worker")
    parser.add_argument("--slot", type=int, required=True)
    parser.add_argument("--listen", required=True, help="the listening sockets of all slots")
    parser.add_argument("--handover", required=True, help="the pair for handing connections over")
    parser.add_argument("--control", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    arguments = parser.parse_args()
    name = f"worker {arguments.slot}"
    begin_process(name, parent=arguments.parent)
    settings = load_settings()
    configure_logging(settings, name)
    sockets = Sockets([socket.socket(fileno=int(fd)) for fd in arguments.listen.split(",")])
    handover = Handover(*(socket.socket(fileno=int(fd)) for fd in arguments.handover.split(",")))
    return run_process(serve(settings, arguments.slot, arguments.control, sockets, handover, open_server))


if __name__ == "__main__":
    sys.exit(main())
