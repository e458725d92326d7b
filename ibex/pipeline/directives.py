"""Which directive is in force for an agent: from memory, else from Postgres; never silently none."""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from time import perf_counter
from uuid import UUID

from ibex.domain.directives import Directive
from ibex.domain.identity import AgentId, OrgId, Principal
from ibex.errors import ServiceDegraded, StoreUnavailable
from ibex.pipeline.changes import ChangeFollower, now
from ibex.stores.directives import DirectiveReader
from ibex.telemetry import Metrics

MOST_AGENTS = 10_000


@dataclass(slots=True)
class _Known:
    directive: Directive | None
    is_stale: bool = False
    """Whether it has changed since it was read; still the last known version while Postgres is away."""


class DirectiveBook:
    """Remembers the directive of each agent, and that an agent has none."""

    def __init__(self, reader: DirectiveReader, follower: ChangeFollower, metrics: Metrics) -> None:
        self._reader = reader
        self._follower = follower
        self._metrics = metrics
        self._known: OrderedDict[AgentId, _Known] = OrderedDict()
        self._reads: dict[AgentId, asyncio.Task[Directive | None]] = {}
        follower.listen(self._mark)

    async def in_force(self, principal: Principal) -> Directive | None:
        """The directive in force, None when the agent is known to have none.

        Raises ServiceDegraded when it cannot be known: stores away, and never seen here.
        """
        known = self._known.get(principal.agent_id)
        if known is not None and not known.is_stale:
            self._metrics.directive_cache_hits_total.inc()
            return known.directive
        self._metrics.directive_cache_misses_total.inc()
        began = perf_counter()
        try:
            return await asyncio.shield(self._read_once(principal.org_id, principal.agent_id))
        except StoreUnavailable:
            self._metrics.directive_resolve_errors_total.inc()
            if known is not None:
                return known.directive
            raise ServiceDegraded(
                "The directive in force cannot be known just now.", headers={"Retry-After": "1"}
            ) from None
        finally:
            self._metrics.directive_resolve_duration_seconds.observe(perf_counter() - began)

    def _read_once(self, org_id: OrgId, agent_id: AgentId) -> asyncio.Task[Directive | None]:
        read = self._reads.get(agent_id)
        if read is None:
            read = asyncio.get_running_loop().create_task(self._read(org_id, agent_id), name="directive read")
            self._reads[agent_id] = read
            read.add_done_callback(lambda _: self._reads.pop(agent_id, None))
        return read

    async def _read(self, org_id: OrgId, agent_id: AgentId) -> Directive | None:
        while True:
            began = now()
            directive = await self._reader.in_force(org_id, agent_id)
            if not self._follower.changed_since(began, (agent_id,)):
                break
        self._known[agent_id] = _Known(directive)
        self._known.move_to_end(agent_id)
        if len(self._known) > MOST_AGENTS:
            self._known.popitem(last=False)
        return directive

    def _mark(self, kind: str, entity_id: UUID | None) -> None:
        if kind not in {"directive", "reset"}:
            return
        for agent_id, known in self._known.items():
            if entity_id is None or agent_id == entity_id:
                known.is_stale = True
                self._metrics.directive_invalidate_total.inc()
