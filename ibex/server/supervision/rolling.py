"""A rolling restart: settings read anew, and every worker and the recorder replaced by one that has them."""

import asyncio
import logging
import time
from collections.abc import Callable

from ibex.config import Settings
from ibex.engines.addresses import StoreAddresses
from ibex.errors import OperatorError, StoreError
from ibex.server.recorder import DRAIN_SECONDS
from ibex.server.supervision.keeping import Keeper
from ibex.server.supervision.launching import Launcher
from ibex.server.supervision.notify import Notifier
from ibex.server.supervision.status import ReloadResult
from ibex.server.supervision.workers import WorkerPool
from ibex.stores.postgres.schema import check_schema
from ibex.telemetry import spawn

log = logging.getLogger("ibex.supervisor")

CHECK_SECONDS = 5.0


class RollingRestart:
    """Replaces a node's processes one after the other, each when its successor serves. One restart at a time."""

    def __init__(
        self,
        read_settings: Callable[[], Settings],
        addresses: Callable[[], StoreAddresses],
        launcher: Launcher,
        pool: WorkerPool,
        recorder: Keeper | None,
        notifier: Notifier,
    ) -> None:
        self._read_settings = read_settings
        self._addresses = addresses
        self._launcher = launcher
        self._pool = pool
        self._recorder = recorder
        self._notifier = notifier
        self._one_at_a_time = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._is_asked = False
        self._scopes: set[asyncio.Timeout] = set()
        """One for each call of `run`: what `stop` ends it by."""
        self._is_over = False

    def start(self) -> None:
        """Have it done, as SIGHUP asks: while one is under way, once more after it."""
        self._is_asked = True
        if self._task is None or self._task.done():
            self._task = spawn(self._run_while_asked(), name="rolling restart")

    async def run(self) -> ReloadResult:
        """Do it, and return when every process has a successor that serves.

        Raises OperatorError when the settings are wrong, Postgres is away, a successor does not start, or the node
        stops: then the processes that have none go on as they are.
        """
        try:
            async with asyncio.timeout(0 if self._is_over else None) as scope:
                self._scopes.add(scope)
                try:
                    with self._notifier.reloading():
                        return await self._run()
                finally:
                    self._scopes.discard(scope)
        except TimeoutError:
            raise OperatorError("The server is stopping.") from None

    async def _run(self) -> ReloadResult:
        async with self._one_at_a_time:
            began = time.monotonic()
            settings = self._read_settings()
            await self._check_postgres()
            former = self._launcher.settings
            ignored = self._launcher.change(settings)
            if ignored:
                log.warning("some settings need a full restart", extra={"settings": ", ".join(ignored)})
            replaced = await self._replace_all(former)
            log.info("rolling restart done", extra={"replaced": len(replaced)})
            return ReloadResult(replaced=replaced, ignored_settings=ignored, seconds=time.monotonic() - began)

    async def stop(self) -> None:
        """End what is under way, and refuse what comes: what was replaced stays so."""
        self._is_over = True
        for scope in self._scopes:
            scope.reschedule(0)
        async with self._one_at_a_time:
            pass

    async def _run_while_asked(self) -> None:
        while self._is_asked:
            self._is_asked = False
            try:
                await self.run()
            except OperatorError as error:
                log.error("not reloaded", extra={"reason": error.message})

    async def _replace_all(self, former: Settings) -> list[str]:
        drain_seconds = self._launcher.settings.shutdown_timeout
        replaced: list[str] = []
        keepers = [(keeper, drain_seconds) for keeper in self._pool.keepers]
        if self._recorder is not None:
            keepers.append((self._recorder, DRAIN_SECONDS))
        for keeper, seconds in keepers:
            failure = await keeper.replace(seconds)
            if failure is not None:
                if not replaced:  # else what falls must come back with the settings its neighbours have
                    self._launcher.settings = former
                raise OperatorError(
                    f"A successor did not start, so the old processes go on. {failure.message}", hint=failure.hint
                )
            replaced.append(keeper.name)
        return replaced

    async def _check_postgres(self) -> None:
        """A new worker knows no caller that it cannot look up."""
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                await check_schema(self._addresses().postgres)
        except (StoreError, TimeoutError) as error:
            raise OperatorError(
                "Postgres does not answer, and new workers would know nobody: nothing was changed.",
                hint="Reload again when Postgres is back; the running workers go on without it.",
            ) from error
