"""Which programs a node's processes are, and with what arguments, environment and sockets each is started."""

import socket
import sys
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from ibex.config import Settings, child_environment
from ibex.engines.datadir import DataDirectory
from ibex.server.messages import AnyMessage
from ibex.server.supervision.children import Child, Program

_PYTHON = (sys.executable, "-P", "-m")
WORKER = (*_PYTHON, "ibex.server.worker")

_FIXED = ("data_dir", "host", "port", "workers", "metrics_host", "metrics_port")
"""Settings that a rolling restart cannot change: they belong to what goes on."""


class Launcher:
    """Starts children with the settings as they now are, and writes them down for the next start to find.

    `worker` is the command of a worker process, to which the arguments of `ibex.server.worker` are added.
    """

    def __init__(
        self,
        settings: Settings,
        directory: DataDirectory,
        *,
        on_message: Callable[[Child, AnyMessage], None],
        on_end: Callable[[Child], None],
        worker: Sequence[str] = WORKER,
    ) -> None:
        self.settings = settings
        self._directory = directory
        self._on_message = on_message
        self._on_end = on_end
        self._worker = worker
        self.sandbox_url: str | None = None
        """Where the sandbox listens, once it does: it is started there again, and workers are sent there."""

    @property
    def upstream(self) -> str:
        """Where chats go: the sandbox, when it stands in for a provider."""
        return self.sandbox_url or self.settings.openai_base_url

    def change(self, settings: Settings) -> list[str]:
        """Use these settings from now on; answers the names of those that had to stay as they were."""
        former = self.settings
        kept = {name: getattr(former, name) for name in _FIXED} | {"llm_mode": former.resolved_llm_mode}
        ignored = [name for name in _FIXED if getattr(settings, name) != kept[name]]
        if settings.resolved_llm_mode != kept["llm_mode"]:
            ignored.append("llm_mode")
        self.settings = settings.model_copy(update=kept)
        return ignored

    async def worker(self, slot: int, sockets: Sequence[socket.socket], handover: Sequence[socket.socket]) -> Child:
        """A worker, which inherits the listening sockets of all slots and its slot's pair for handing over."""
        settings = self.settings.model_copy(update={"openai_base_url": self.upstream})
        listen, pair = (",".join(str(sock.fileno()) for sock in some) for some in (sockets, handover))
        command = (*self._worker, "--slot", str(slot), "--listen", listen, "--handover", pair)
        environment = child_environment(settings, with_provider_keys=True)
        return await self._start(Program(f"worker {slot}", command, environment, (*sockets, *handover)))

    async def recorder(self) -> Child:
        """The recorder."""
        return await self._start_module("recorder")

    async def sandbox(self) -> Child:
        """The sandbox, on the port it had before."""
        port = urlsplit(self.sandbox_url).port if self.sandbox_url else 0
        return await self._start_module("sandbox", "--port", str(port))

    async def _start_module(self, name: str, *arguments: str) -> Child:
        environment = child_environment(self.settings, with_provider_keys=False)
        return await self._start(Program(name, (*_PYTHON, f"ibex.server.{name}", *arguments), environment))

    async def _start(self, program: Program) -> Child:
        child = await Child.start(program, self._on_message, self._forget)
        self._directory.record_child(program.name, child.pid)
        return child

    def _forget(self, child: Child) -> None:
        self._directory.forget_child(child.pid)
        self._on_end(child)
