"""A whole node in this process, with small workers, for tests of the supervisor."""

import asyncio
import dataclasses
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from ibex.config import Settings
from ibex.server.supervision.shutdown import StopResult
from ibex.server.supervision.status import NodeStatus
from ibex.server.supervision.supervisor import Supervisor

SMALL_WORKER = (sys.executable, str(Path(__file__).with_name("small_worker.py")))


@dataclasses.dataclass
class Node:
    """A running node, and a client that never reuses a connection."""

    supervisor: Supervisor
    task: asyncio.Task[StopResult]
    http: aiohttp.ClientSession

    @property
    def status(self) -> NodeStatus:
        return self.supervisor.status()

    def pid(self, name: str) -> int | None:
        return next((process.pid for process in self.status.processes if process.name == name), None)

    async def ask(self, path: str = "/") -> Any:
        async with self.http.get(self.status.url + path) as response:
            text = await response.text()
            return await response.json() if response.content_type == "application/json" else text

    async def pids(self) -> set[int]:
        """Who answers: enough connections that every listening socket gets some."""
        answers = await asyncio.gather(*(self.ask() for _ in range(40)))
        return {answer["pid"] for answer in answers}

    async def stop(self) -> StopResult:
        self.supervisor.stop()
        return await asyncio.wait_for(self.task, 30)


@asynccontextmanager
async def running(settings: Settings, **options: Any) -> AsyncIterator[Node]:
    ready = asyncio.Event()
    options = {"worker": SMALL_WORKER, "has_recorder": False, **options}
    supervisor = Supervisor(settings, on_ready=lambda _: ready.set(), **options)
    task = asyncio.get_running_loop().create_task(supervisor.run())
    started = asyncio.get_running_loop().create_task(ready.wait())
    await asyncio.wait({task, started}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        started.cancel()
        task.result()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as http:
        node = Node(supervisor, task, http)
        try:
            yield node
        finally:
            if not task.done():
                await node.stop()


async def eventually(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(20):
        while not await holds():  # noqa: ASYNC110 (the condition is another process's state)
            await asyncio.sleep(0.02)


def is_alive(pid: int | None) -> bool:
    return pid is not None and Path(f"/proc/{pid}").exists()
