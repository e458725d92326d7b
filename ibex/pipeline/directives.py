"""Which directive is in force for an agent: from memory, else from Postgres; never silently none."""

import logging
import sys
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from uuid import UUID

from ibex.domain.directives import Directive
from ibex.domain.identity import AgentId, OrgId, Principal
from ibex.errors import ServiceDegraded, StoreError
from ibex.pipeline.changes import ChangeFollower, now
from ibex.pipeline.single_flight import SingleFlight
from ibex.stores.postgres.directives import DirectiveReader
from ibex.telemetry import Metrics

log = logging.getLogger("ibex.directives")

MOST_AGENTS = 10_000
MOST_BYTES = 64 << 20
"""Of directives' texts, in memory."""
READ_ATTEMPTS = 3
READ_SECONDS = 2.0
"""How long one read may take, waiting for a connection too."""


@dataclass(slots=True)
class _Known:
    directive: Directive | None
    is_stale: bool = False
    """Whether it has changed since it was read; still the last known version while Postgres is away."""

    @property
    def size(self) -> int:
        """Bytes of its text, in memory."""
        return 0 if self.directive is None else sys.getsizeof(self.directive.text)


class DirectiveBook:
    """Remembers the directive of each agent, and that an agent has none; those used longest ago are forgotten."""

    def __init__(self, reader: DirectiveReader, follower: ChangeFollower, metrics: Metrics) -> None:
        self._reader = reader
        self._follower = follower
        self._known: OrderedDict[AgentId, _Known] = OrderedDict()
        self._bytes = 0
        self._reads: SingleFlight[AgentId, Directive | None] = SingleFlight("directive read")
        self._hits = metrics.directive_cache_hits_total.labels()
        self._misses = metrics.directive_cache_misses_total.labels()
        self._errors = metrics.directive_resolve_errors_total.labels()
        self._invalidated = metrics.directive_invalidate_total.labels()
        self._seconds = metrics.directive_resolve_duration_seconds.labels()
        follower.listen(self._mark)

    async def in_force(self, principal: Principal) -> Directive | None:
        """The directive in force, None when the agent is known to have none.

        Raises ServiceDegraded when it cannot be known: stores away, and never seen here.
        """
        agent_id = principal.agent_id
        known = self._known.get(agent_id)
        if known is not None and not known.is_stale and self._follower.is_current(now()):
            self._known.move_to_end(agent_id)
            self._hits.inc()
            return known.directive
        began = perf_counter()
        try:
            return await self._resolve(principal.org_id, agent_id)
        finally:
            self._seconds.observe(perf_counter() - began)

    async def _resolve(self, org_id: OrgId, agent_id: AgentId) -> Directive | None:
        """What is in force after catching up with Postgres; the last known version when Postgres is away."""
        is_current = await self._follower.catch_up()
        known = self._known.get(agent_id)
        if known is not None and not (is_current and known.is_stale):
            self._hits.inc()
            return known.directive
        self._misses.inc()
        if is_current:
            try:
                return await self._reads.run(agent_id, partial(self._read, org_id, agent_id))
            except StoreError as error:
                log.warning("a directive could not be read", extra={"reason": error.message})
        self._errors.inc()
        if known is None:
            raise ServiceDegraded("The directive in force cannot be known just now.", headers={"Retry-After": "1"})
        return known.directive

    async def _read(self, org_id: OrgId, agent_id: AgentId) -> Directive | None:
        for _ in range(READ_ATTEMPTS):
            began = now()
            directive = await self._reader.in_force(org_id, agent_id, timeout=READ_SECONDS)
            if not self._follower.changed_since(began, (agent_id,)):
                self._remember(agent_id, directive)
                break
        return directive

    def _remember(self, agent_id: AgentId, directive: Directive | None) -> None:
        self._forget(agent_id)
        self._known[agent_id] = known = _Known(directive)
        self._bytes += known.size
        while len(self._known) > MOST_AGENTS or self._bytes > MOST_BYTES:
            self._forget(next(iter(self._known)))

    def _forget(self, agent_id: AgentId) -> None:
        known = self._known.pop(agent_id, None)
        if known is not None:
            self._bytes -= known.size

    def _mark(self, kind: str, entity_id: UUID | None) -> None:
        if kind == "reset":
            changed = list(self._known.values())
        elif kind == "directive" and entity_id is not None and AgentId(entity_id) in self._known:
            changed = [self._known[AgentId(entity_id)]]
        else:
            return
        for known in changed:
            self._invalidated.inc(not known.is_stale)
            known.is_stale = True
