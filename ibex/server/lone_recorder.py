"""The recorder as a service of its own, beside a `serve --no-recorder`, so that each can be a container of its own."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable
from contextlib import AsyncExitStack

import msgspec

from ibex import __version__
from ibex.config import Settings
from ibex.engines.addresses import StoreAddresses, resolve_addresses
from ibex.engines.datadir import DataDirectory
from ibex.errors import OperatorError, ServerNotRunning
from ibex.recorder.lock import find_recorder
from ibex.runtime import open_recorder
from ibex.server.process import begin_process, run_process
from ibex.server.recorder import read_backlog
from ibex.server.supervision.databases import check_record_stores
from ibex.server.supervision.node_metrics import MetricsEndpoint
from ibex.telemetry import Metrics, configure_logging, render_metrics, spawn

log = logging.getLogger("ibex.recorder")

ENGINES_SECONDS = 1.0
TAKEN_SECONDS = 1.0
"""For as long the journal must be taken before it counts as another recorder's: looking at a lock takes it."""


class LoneRecorderStatus(msgspec.Struct, kw_only=True):
    """What runs, once it does."""

    version: str
    pid: int
    journal: str
    metrics_url: str | None
    """None in development, where nothing but the proxy listens."""


class LoneRecorder:
    """Delivers a journal from the start to SIGTERM or SIGINT, when nobody else does."""

    def __init__(self, settings: Settings, on_ready: Callable[[LoneRecorderStatus], None]) -> None:
        self._settings = settings
        self._on_ready = on_ready
        self._stop = asyncio.Event()
        self._lost_engines: ServerNotRunning | None = None
        self._metrics = Metrics()
        self._endpoint = MetricsEndpoint(lambda: render_metrics([self._metrics.snapshot()]))

    async def run(self) -> int:
        """Deliver until told to end; answers how many turns are left in the journal.

        Raises OperatorError when the journal has a recorder, when the databases are not fit, and, with embedded
        stores, when no server runs them or runs them no longer.
        """
        settings = self._settings
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._stop.set)
        DataDirectory(settings.data_dir).prepare()
        addresses = resolve_addresses(settings)
        await self._refuse_second_recorder()
        await check_record_stores(settings, addresses)
        async with AsyncExitStack() as stack:
            recorder, _ = await stack.enter_async_context(open_recorder(settings, metrics=self._metrics))
            self._metrics.build_info.labels(__version__).set(1)
            self._metrics.process_up.labels("recorder").set(1)
            if not settings.is_development:
                stack.push_async_callback(self._endpoint.close)
                await self._endpoint.start(settings.metrics_host, settings.metrics_port)
            watch = spawn(self._watch_engines(addresses), name="engine watch")
            stack.callback(watch.cancel)
            self._on_ready(self._status())
            await recorder.run(self._stop)
        if self._lost_engines is not None:
            raise self._lost_engines
        left = int(read_backlog(self._metrics)["pending_turns"])
        log.info("stopped", extra={"undelivered_turns": left})
        return left

    def _status(self) -> LoneRecorderStatus:
        return LoneRecorderStatus(
            version=__version__,
            pid=os.getpid(),
            journal=str(self._settings.journal_dir.resolve()),
            metrics_url=self._endpoint.url,
        )

    async def _refuse_second_recorder(self) -> None:
        directory, began = self._settings.journal_dir, time.monotonic()
        while (pid := find_recorder(directory)) is not None:
            if time.monotonic() - began > TAKEN_SECONDS:
                raise OperatorError(
                    f"The journal {directory} has a recorder already: process {pid}.",
                    hint="Start a server that should leave it to `ibexctl recorder` with --no-recorder.",
                )
            await asyncio.sleep(0.05)

    async def _watch_engines(self, addresses: StoreAddresses) -> None:
        """End when the server is gone whose engines are used: the next one has them at other addresses."""
        while not self._stop.is_set():
            await asyncio.sleep(ENGINES_SECONDS)
            try:
                is_same = resolve_addresses(self._settings) == addresses
            except ServerNotRunning:
                is_same = False
            if not is_same:
                self._lost_engines = ServerNotRunning(
                    "The server has ended whose embedded stores this recorder used; the journal keeps what is left.",
                    hint="Start it again when the server runs.",
                )
                self._stop.set()


def record(settings: Settings, on_ready: Callable[[LoneRecorderStatus], None] = lambda _status: None) -> int:
    """Run a lone recorder to its end in this process's main thread; answers how many turns are left in the journal.

    Raises OperatorError as `LoneRecorder.run` does.
    """
    begin_process("recorder")
    configure_logging(settings, "recorder")
    return run_process(LoneRecorder(settings, on_ready).run())
