"""The metrics of the whole node: the latest of each living process, and what the ended ones had counted."""

from collections.abc import Callable, Iterable

from aiohttp import web

from ibex import __version__
from ibex.errors import OperatorError
from ibex.server.supervision.children import Child
from ibex.telemetry import Metrics, merge_snapshots, render_metrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class NodeMetrics:
    """Sums the children's snapshots. Counts of a process that ended stay in the sums; its levels go with it.

    `processes` tells the names of the node's processes, which of them live, and how often each was started again.
    """

    def __init__(self, processes: Callable[[], Iterable[tuple[str, bool, int]]]) -> None:
        self._processes = processes
        self._own = Metrics()
        self._own.build_info.labels(__version__).set(1)
        self._ended = merge_snapshots([], with_gauges=False)
        self._latest: dict[Child, bytes] = {}

    def record(self, child: Child, snapshot: bytes) -> None:
        """A child's counts as they now are."""
        self._latest[child] = snapshot

    def retire(self, child: Child) -> None:
        """A child has ended."""
        last = self._latest.pop(child, None)
        if last is not None:
            self._ended = merge_snapshots([self._ended, last], with_gauges=False)

    def render(self) -> bytes:
        """Prometheus' text format."""
        for name, is_up, restarts in self._processes():
            self._own.process_up.labels(name).set(float(is_up))
            self._own.process_restarts_total.labels(name).value = float(restarts)
        return render_metrics([self._own.snapshot(), self._ended, *self._latest.values()])


class MetricsEndpoint:
    """/metrics on an address of its own, outside development."""

    def __init__(self, render: Callable[[], bytes]) -> None:
        self._render = render
        self._runner: web.AppRunner | None = None
        self.url: str | None = None

    async def start(self, host: str, port: int) -> None:
        """Listen; raises OperatorError when the address cannot be had."""
        app = web.Application()
        app.router.add_get("/metrics", self._answer)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        try:
            await site.start()
        except OSError as error:
            await self.close()
            raise OperatorError(
                f"Cannot serve /metrics on port {port} of {host}: {error.strerror}.",
                hint="Set IBEX_METRICS_PORT or IBEX_METRICS_HOST.",
            ) from error
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"

    async def close(self) -> None:
        """Stop listening."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _answer(self, _request: web.Request) -> web.Response:
        return web.Response(body=self._render(), headers={"Content-Type": CONTENT_TYPE})
