"""The supervisor: starts a node's processes in order, keeps them alive, and stops them in order."""

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any

from ibex import __version__
from ibex.config import Settings, take_notify_socket
from ibex.engines.datadir import DataDirectory
from ibex.engines.embedded import EmbeddedEngines
from ibex.server.messages import AnyMessage, MetricsAnswer, MetricsQuestion, Report, StatusAnswer, StatusQuestion
from ibex.server.process import begin_process
from ibex.server.recorder import DRAIN_SECONDS
from ibex.server.supervision.children import Child
from ibex.server.supervision.databases import prepare_databases
from ibex.server.supervision.engine_watch import EngineWatch
from ibex.server.supervision.keeping import Keeper
from ibex.server.supervision.launching import WORKER, Launcher
from ibex.server.supervision.node_metrics import MetricsEndpoint, NodeMetrics
from ibex.server.supervision.notify import Notifier
from ibex.server.supervision.proof import prove_token_is_demanded
from ibex.server.supervision.rolling import RollingRestart
from ibex.server.supervision.shutdown import Shutdown, StopResult
from ibex.server.supervision.sockets import open_listening_sockets, url_of
from ibex.server.supervision.status import ControlSocket, NodeStatus, ProcessStatus, describe_process
from ibex.server.supervision.watchdog import Watchdog
from ibex.server.supervision.workers import WorkerPool
from ibex.stores.journal.room import JournalRoom
from ibex.telemetry import configure_logging

log = logging.getLogger("ibex.supervisor")

SANDBOX_DRAIN_SECONDS = 1.0


class Supervisor:
    """One node. `run` returns when it was told to stop and nothing it started is left, and says how the stop went.

    `reload` reads the settings anew for a rolling restart; `worker` is Launcher's.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        on_progress: Callable[[str], None] = lambda _line: None,
        on_ready: Callable[[NodeStatus], None] = lambda _status: None,
        reload: Callable[[], Settings] | None = None,
        has_recorder: bool = True,
        worker: Sequence[str] = WORKER,
        notifier: Notifier | None = None,
    ) -> None:
        self._settings = settings
        self._on_progress = on_progress
        self._on_ready = on_ready
        self._notifier = notifier or Notifier()
        self._directory = DataDirectory(settings.data_dir)
        self._is_first_start = not self._directory.run_dir.exists()
        self._started_at = datetime.now(UTC)
        self._started = time.monotonic()
        self._start_seconds: float | None = None
        self._metrics = NodeMetrics(self._liveness)
        self._endpoint = MetricsEndpoint(self._metrics.render)
        self._engines = EmbeddedEngines(settings)
        self._watches: list[EngineWatch] = []
        self._watchdog = Watchdog(self._children, lambda: self._launcher.settings.watchdog_seconds)
        self._warnings: list[str] = []
        self._launcher = launcher = Launcher(
            settings, self._directory, on_message=self._hear, on_end=self._forget, worker=worker
        )
        self._sandbox = (
            Keeper("sandbox", launcher.sandbox, on_up=self._note_sandbox)
            if settings.resolved_llm_mode == "sandbox"
            else None
        )
        self._recorder = Keeper("recorder", launcher.recorder) if has_recorder else None
        self._pool = WorkerPool(settings.workers, launcher.worker)
        self._url = f"http://{settings.host}:{settings.port}"
        self._main: asyncio.Task[object] | None = None
        """The task of `run` while it starts: an early stop cancels it."""
        self._shutdown = Shutdown(self._count_in_flight)
        self._rolling = RollingRestart(
            reload or (lambda: settings),
            lambda: self._engines.addresses,
            launcher,
            self._pool,
            self._recorder,
            self._notifier,
        )

    async def run(self) -> StopResult:
        """Start, serve until SIGTERM or SIGINT, stop. Raises OperatorError when the node cannot start."""
        with self._signals():
            async with AsyncExitStack() as stack:
                await self._start_or_stop(stack)
                await self._shutdown.ordered()
        undelivered: Any = self._recorder_facts.get("pending_turns")
        result = self._shutdown.result(None if undelivered is None else int(undelivered))
        log.log(logging.INFO if result.is_clean else logging.ERROR, "stopped", extra=result.facts)
        return result

    def stop(self) -> None:
        """Stop; asked again, do not wait for what is under way."""
        if self._shutdown.is_ordered:
            for keeper in self._keepers():
                keeper.hurry()
        elif self._main is not None:
            self._main.cancel()
        self._notifier.stopping()
        self._shutdown.order()

    def status(self) -> NodeStatus:
        """How the node is."""
        settings = self._launcher.settings
        return NodeStatus(
            version=__version__,
            env=settings.env,
            url=self._url,
            metrics_url=self._endpoint.url or f"{self._url}/metrics",
            data_dir=str(self._directory.path),
            llm_mode=settings.resolved_llm_mode,
            upstream=self._launcher.upstream,
            started_at=self._started_at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            uptime_seconds=time.monotonic() - self._started,
            start_seconds=self._start_seconds,
            is_first_start=self._is_first_start,
            engines=[f"{engine.label} {engine.version}" for engine in self._engines.engines],
            processes=list(self._processes()),
            warnings=self._warnings,
            stop=self._shutdown.status,
        )

    async def _start_or_stop(self, stack: AsyncExitStack) -> None:
        self._main = main = asyncio.current_task()
        try:
            await self._start(stack)
        except asyncio.CancelledError:
            if main is None or not self._shutdown.is_ordered:
                raise
            main.uncancel()
        else:
            self._start_seconds = time.monotonic() - self._started
            if self._settings.journal_dir.exists():  # else nobody has ever written a turn
                self._warn_of_full_journal()
            self._on_ready(self.status())
            self._notifier.ready(f"Serves on {self._url}")
        finally:
            self._main = None

    async def _start(self, stack: AsyncExitStack) -> None:
        """Everything in its order; what is pushed on the stack stops in reverse."""
        self._directory.prepare()
        stack.enter_context(self._directory.lock())
        left = await asyncio.to_thread(self._directory.stop_leftovers)
        if left:
            log.warning("stopped what a server left behind that had died", extra={"processes": ", ".join(left)})
        open_listening_sockets(self._settings.host, self._settings.port, 0)
        stack.push_async_callback(self._engines.stop)
        await self._engines.start(lambda name, happened: self._on_progress(f"{name}: {happened}"))
        self._watches = [EngineWatch(engine) for engine in self._engines.engines]
        for watch in self._watches:
            stack.push_async_callback(watch.stop)
        starts: list[Awaitable[None]] = [prepare_databases(self._settings, self._engines.addresses)]
        if self._sandbox is not None:
            stack.push_async_callback(self._sandbox.stop, SANDBOX_DRAIN_SECONDS)
            starts.append(self._sandbox.start())
        await side_by_side(*starts)
        await self._start_serving(stack)

    async def _start_serving(self, stack: AsyncExitStack) -> None:
        settings = self._settings
        sockets = open_listening_sockets(settings.host, settings.port, settings.workers)
        self._url = url_of(sockets[0])
        control = ControlSocket(settings.run_dir, self.status, self._rolling.run)
        stack.push_async_callback(control.close)
        stack.push_async_callback(self._endpoint.close)
        starts = [self._pool.start(sockets)]
        if self._recorder is not None:
            stack.push_async_callback(self._stop_recorder, self._recorder)
            starts.append(self._recorder.start())
        stack.push_async_callback(self._stop_workers)
        stack.push_async_callback(self._rolling.stop)
        stack.push_async_callback(self._watchdog.stop)
        await side_by_side(*starts)
        self._watchdog.start()
        await prove_token_is_demanded(self._url, times=settings.workers)
        await control.start()
        if not settings.is_development:
            await self._endpoint.start(settings.metrics_host, settings.metrics_port)

    def _warn_of_full_journal(self) -> None:
        room = JournalRoom.of(self._settings)
        room.measure()
        for excess in room.excess:
            self._warnings.append(f"chats are refused, since the journal is past its bounds: {excess}")
            log.warning("chats are refused", extra={"reason": excess})

    async def _stop_workers(self) -> None:
        settings, shutdown = self._launcher.settings, self._shutdown
        if settings.shutdown_delay and self._start_seconds is not None:
            self._pool.withdraw()
            await shutdown.part("leaving", settings.shutdown_delay, shutdown.pause(settings.shutdown_delay))
        await shutdown.part("draining", settings.shutdown_timeout, self._pool.stop(settings.shutdown_timeout))

    async def _stop_recorder(self, recorder: Keeper) -> None:
        await self._shutdown.part("delivering", DRAIN_SECONDS, recorder.stop(DRAIN_SECONDS))

    # What children say

    def _hear(self, child: Child, message: AnyMessage) -> None:
        self._pool.hear(child, message)
        match message:
            case Report(snapshot, _):
                self._metrics.record(child, snapshot)
            case MetricsQuestion(number):
                child.send(MetricsAnswer(number, self._metrics.render()))
            case StatusQuestion(number):
                child.send(StatusAnswer(number, {**self.status().as_dict(), "recorder": self._recorder_facts}))
            case _:
                pass

    def _forget(self, child: Child) -> None:
        self._pool.forget(child)
        self._metrics.retire(child)
        self._shutdown.note_end(child)

    def _note_sandbox(self) -> None:
        if self._sandbox is not None and self._sandbox.child is not None:
            self._launcher.sandbox_url = str(self._sandbox.child.facts["base_url"])

    # What there is

    @property
    def _recorder_facts(self) -> dict[str, object]:
        child = self._recorder.child if self._recorder is not None else None
        return child.facts if child is not None else {}

    def _count_in_flight(self) -> int:
        children = (child for keeper in self._pool.keepers for child in keeper.children if child.is_alive)
        return sum(int(child.facts.get("in_flight", 0)) for child in children)

    def _keepers(self) -> list[Keeper]:
        return [*self._pool.keepers, *(keeper for keeper in (self._recorder, self._sandbox) if keeper is not None)]

    def _children(self) -> list[Child]:
        return [keeper.child for keeper in self._keepers() if keeper.child is not None]

    def _liveness(self) -> Iterator[tuple[str, bool, int]]:
        yield "supervisor", True, 0
        for keeper in self._keepers():
            yield keeper.name, keeper.is_up, keeper.restarts
        for watch in self._watches:
            yield f"engine {watch.engine.name}", watch.is_up, watch.restarts

    def _processes(self) -> Iterator[ProcessStatus]:
        yield describe_process("supervisor", os.getpid(), True, time.monotonic() - self._started)
        for keeper in self._keepers():
            child = keeper.child
            if child is not None:
                yield describe_process(
                    keeper.name, child.pid, keeper.is_up, child.lifetime, keeper.restarts, child.facts
                )
        for watch in self._watches:
            age = time.monotonic() - watch.started
            yield describe_process(f"engine {watch.engine.name}", watch.engine.pid, watch.is_up, age, watch.restarts)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        # to a server in a terminal SIGHUP says that the terminal is gone; to a service it says: read the settings again
        on_hangup = self.stop if os.isatty(0) else self._rolling.start
        handlers = {signal.SIGTERM: self.stop, signal.SIGINT: self.stop, signal.SIGHUP: on_hangup}
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
        try:
            yield
        finally:
            for number in handlers:
                loop.remove_signal_handler(number)


async def side_by_side(*starts: Awaitable[None]) -> None:
    """Await all of them, and then raise the first error there was: nothing is left half started."""
    for outcome in await asyncio.gather(*starts, return_exceptions=True):
        if outcome is not None:
            raise outcome


def serve(
    settings: Settings,
    *,
    on_progress: Callable[[str], None] = lambda _line: None,
    on_ready: Callable[[NodeStatus], None] = lambda _status: None,
    reload: Callable[[], Settings] | None = None,
    has_recorder: bool = True,
) -> StopResult:
    """Run a supervisor to its end in this process's main thread. Raises OperatorError when it cannot start."""
    begin_process("supervisor")
    configure_logging(settings, "supervisor")
    supervisor = Supervisor(
        settings,
        on_progress=on_progress,
        on_ready=on_ready,
        reload=reload,
        has_recorder=has_recorder,
        notifier=Notifier(take_notify_socket()),
    )
    return asyncio.run(supervisor.run())
