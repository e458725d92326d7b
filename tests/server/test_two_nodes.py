"""A node is restarted, as for an upgrade of its supervisor, while another serves: who heeds /ready notices nothing."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager

import aiohttp

from ibex.config import Settings
from ibex.sandbox import Sandbox
from ibex.server.supervision.launching import WORKER
from tests.conftest import new_data_dir
from tests.server.nodes import Node, eventually, running
from tests.server.served import with_upstream

CHAT = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "hello"}]}
CLIENTS = 4
POLL_SECONDS = 0.02


class Balancer:
    """What stands before the nodes: it asks each whether it is ready, and sends requests to those that are."""

    def __init__(self, http: aiohttp.ClientSession, headers: dict[str, str]) -> None:
        self._http = http
        self._headers = headers
        self._urls: list[str] = []
        self._asked = 0
        self.ready: list[str] = []
        self.answers: Counter[tuple[str, int]] = Counter()
        self.under_way: Counter[str] = Counter()

    def add(self, url: str) -> None:
        self._urls.append(url)

    async def watch(self) -> None:
        while True:
            states = await asyncio.gather(*(self._is_ready(url) for url in self._urls))
            self.ready = [url for url, is_ready in zip(self._urls, states, strict=True) if is_ready]
            await asyncio.sleep(POLL_SECONDS)

    async def ask_on(self) -> None:
        """One client: it asks, and asks again. Any failure but an answer is the test's."""
        while True:
            self._asked += 1
            url = self.ready[self._asked % len(self.ready)]
            self.under_way[url] += 1
            async with self._http.post(f"{url}/v1/chat/completions", json=CHAT, headers=self._headers) as response:
                await response.read()
                self.answers[url, response.status] += 1
            self.under_way[url] -= 1
            await asyncio.sleep(POLL_SECONDS)

    async def answered_by(self, url: str) -> None:
        """Wait for one answer more from this node."""
        before = self.answers[url, 200]
        await eventually(lambda: _returns(self.answers[url, 200] > before))

    async def _is_ready(self, url: str) -> bool:
        with contextlib.suppress(aiohttp.ClientError):
            async with self._http.get(f"{url}/ready") as response:
                return response.status == 200
        return False


async def _returns(value: bool) -> bool:
    return value


def a_node(settings: Settings) -> AbstractAsyncContextManager[Node]:
    """A whole node but for its recorder."""
    return running(settings, worker=WORKER)


@asynccontextmanager
async def balancing(headers: dict[str, str]) -> AsyncIterator[Balancer]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        yield Balancer(http, headers)


async def test_a_node_restarted_beside_another_fails_no_request(settings: Settings, headers: dict[str, str]) -> None:
    async with AsyncExitStack() as stack:
        sandbox = await stack.enter_async_context(Sandbox.serve())
        balancer = await stack.enter_async_context(balancing(headers))
        one = with_upstream(settings, sandbox).model_copy(update={"workers": 1})
        elsewhere = one.model_copy(update={"data_dir": stack.enter_context(new_data_dir())})
        node = await stack.enter_async_context(a_node(one.model_copy(update={"shutdown_delay": 60})))
        other = await stack.enter_async_context(a_node(elsewhere))
        for url in (node.status.url, other.status.url):
            balancer.add(url)
        async with asyncio.TaskGroup() as tasks:
            working = [tasks.create_task(balancer.watch())]
            await eventually(lambda: _returns(len(balancer.ready) == 2))
            working += [tasks.create_task(balancer.ask_on()) for _ in range(CLIENTS)]
            url = node.status.url
            await balancer.answered_by(url)
            node.supervisor.stop()
            await eventually(lambda: _returns(balancer.ready == [other.status.url] and not balancer.under_way[url]))
            stopped = await node.stop()  # the rest of the delay would change nothing
            place = {"port": int(url.rpartition(":")[2])}
            again = await stack.enter_async_context(a_node(one.model_copy(update=place)))
            await balancer.answered_by(again.status.url)
            await balancer.answered_by(other.status.url)
            for task in working:
                task.cancel()

    assert stopped.is_clean
    assert {status for _, status in balancer.answers} == {200}
    assert again.status.url == url
