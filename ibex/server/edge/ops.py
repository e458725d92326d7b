"""Whether this process lives, whether it can serve, and what it has counted."""

import asyncio
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST

from ibex.errors import IbexError
from ibex.runtime import Worker
from ibex.server.control import Control
from ibex.server.edge.answers import answer_json
from ibex.server.edge.inbound import Inbound
from ibex.server.edge.wire import WireReply

CHECK_SECONDS = 0.5
ALL_CHECKS_SECONDS = 0.75
PRESSURE_DEGRADED = 0.8

Check = Callable[[], Awaitable[str | None]]
"""Returns what is wrong, or None."""


class Operations:
    """The routes for operators and their load balancers."""

    def __init__(self, worker: Worker, control: Control) -> None:
        self._worker = worker
        self._control = control
        self.is_draining = False

    async def health(self, _inbound: Inbound, reply: WireReply) -> None:
        """200 while the process lives."""
        await answer_json(reply, 200, {"status": "ok"})

    async def metrics(self, _inbound: Inbound, reply: WireReply) -> None:
        """The whole node's metrics."""
        text = await self._control.metrics_text()
        reply.begin(200, {"Content-Type": CONTENT_TYPE_LATEST}, length=len(text))
        await reply.finish(text)

    async def ready(self, _inbound: Inbound, reply: WireReply) -> None:
        """200 `ok` or `degraded` while known callers are served, else 503 `unhealthy`."""
        checks: dict[str, Check] = {
            "postgres": self._check_postgres,
            "redis": self._check_redis,
            "clickhouse": self._check_clickhouse,
            "provider": self._check_provider,
            "journal": self._check_journal,
        }
        results = dict(zip(checks, await asyncio.gather(*map(_time, checks.values())), strict=True))
        status = self._sum_up(results)
        await answer_json(reply, 503 if status == "unhealthy" else 200, {"status": status, "checks": results})

    def _sum_up(self, results: dict[str, dict[str, Any]]) -> str:
        refuses_turns = results["journal"]["status"] == "unhealthy"
        hears_nobody = results["postgres"]["status"] != "ok" and results["redis"]["status"] != "ok"
        if self.is_draining or refuses_turns or hears_nobody:
            return "unhealthy"
        return "ok" if all(result["status"] == "ok" for result in results.values()) else "degraded"

    async def _check_postgres(self) -> str | None:
        async with self._worker.postgres.transaction(timeout=CHECK_SECONDS):
            return None

    async def _check_redis(self) -> str | None:
        await self._worker.redis.call("PING", deadline=CHECK_SECONDS)
        return None

    async def _check_clickhouse(self) -> str | None:
        """ClickHouse is the recorder's: it says whether its last delivery went through."""
        facts = await self._control.node_status()
        error = facts.get("recorder", {}).get("clickhouse_error")
        return None if error is None else str(error)

    async def _check_provider(self) -> str | None:
        away = [provider.name for provider in self._worker.providers if provider.is_away]
        return f"The last call to {', '.join(away)} found nobody who answers." if away else None

    async def _check_journal(self) -> str | None:
        self._worker.journal.check_room()
        pressure = self._worker.journal.pressure
        return f"The journal is {pressure:.0%} full." if pressure >= PRESSURE_DEGRADED else None


async def _time(check: Check) -> dict[str, Any]:
    """Run one check within its deadline; what it says, and how long it took."""
    began = perf_counter()
    result: dict[str, Any] = {"status": "ok"}
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            message = await check()
    except TimeoutError:
        result = {"status": "unhealthy", "message": f"No answer within {CHECK_SECONDS * 1e3:.0f} ms."}
    except IbexError as error:
        result = {"status": "unhealthy", "message": error.message}
    else:
        if message is not None:
            result = {"status": "degraded", "message": message}
    return {**result, "latency_ms": round((perf_counter() - began) * 1e3, 3)}
