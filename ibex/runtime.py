"""Three small builders (worker, recorder, command line), each opening only what it needs and closing in reverse."""

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from ibex.config import Settings
from ibex.domain.identity import OrgId
from ibex.telemetry import Metrics

if TYPE_CHECKING:
    from ibex.engines.addresses import StoreAddresses
    from ibex.pipeline.authentication import Authenticator
    from ibex.pipeline.directives import DirectiveBook
    from ibex.pipeline.idempotency import Idempotency
    from ibex.pipeline.rate_limiting import RateLimiter
    from ibex.pipeline.routing import Router
    from ibex.recorder import Recorder
    from ibex.stores.changes import Change
    from ibex.stores.clickhouse import TraceStore
    from ibex.stores.directives import DirectiveAdmin
    from ibex.stores.identity import IdentityAdmin
    from ibex.stores.journal import Journal
    from ibex.stores.migrations import Migrator
    from ibex.stores.postgres import Postgres
    from ibex.stores.sessions import SessionStore


class Neighbours(Protocol):
    """The other workers of this node (`ibex.server.control.Control`)."""

    on_share: Callable[[bytes], None] | None

    def share(self, payload: bytes, *, key: bytes | None = None) -> None:
        """Give them a payload, without waiting."""
        ...


@dataclass
class Worker:
    """What serves requests in one worker process; the HTTP edge is `ibex.server.app`'s."""

    settings: Settings
    slot: int
    metrics: Metrics
    authenticator: "Authenticator"
    rate_limiter: "RateLimiter"
    directive_book: "DirectiveBook"
    router: "Router"
    idempotency: "Idempotency"
    journal: "Journal"


@asynccontextmanager
async def open_worker(
    settings: Settings, *, slot: int, metrics: Metrics, neighbours: Neighbours
) -> AsyncIterator[Worker]:
    """Open what a worker needs; nothing here waits for a store that is away."""
    raise NotImplementedError
    yield


@asynccontextmanager
async def open_recorder(settings: Settings, *, metrics: Metrics) -> AsyncIterator["Recorder"]:
    """Open what the recorder needs; nothing here waits for a store that is away."""
    raise NotImplementedError
    yield


@dataclass
class Operator:
    """What the command line works with: the stores as their owner."""

    settings: Settings
    addresses: "StoreAddresses"
    _postgres: "Postgres | None" = None
    _traces: "TraceStore | None" = None
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    @cached_property
    def identity(self) -> "IdentityAdmin":
        """Organizations, agents, tokens and limits."""
        raise NotImplementedError

    @cached_property
    def directives(self) -> "DirectiveAdmin":
        """Directives and their versions."""
        raise NotImplementedError

    @cached_property
    def sessions(self) -> "SessionStore":
        """Sessions and checkpoints of all organizations."""
        raise NotImplementedError

    @property
    def traces(self) -> "TraceStore":
        """Traces; needs `clickhouse=True`."""
        raise NotImplementedError

    @property
    def migrator(self) -> "Migrator":
        """The migrations of Postgres."""
        raise NotImplementedError

    async def publish(self, changes: "Iterable[Change]") -> None:
        """Tell running servers at once what was committed; without Redis they learn it from Postgres a moment later."""
        raise NotImplementedError

    async def all_org_ids(self) -> list[OrgId]:
        """Every organization there is: the scope of an operator's query without `--org`."""
        raise NotImplementedError


@asynccontextmanager
async def open_operator(
    settings: Settings, *, postgres: bool = True, redis: bool = True, clickhouse: bool = False
) -> AsyncIterator[Operator]:
    """Open the stores a command needs.

    A running server's engines are used; without one, those needed are started and stopped again afterwards.
    """
    raise NotImplementedError
    yield
