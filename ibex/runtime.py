"""Three small builders (worker, recorder, command line), each opening only what it needs and closing in reverse."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol
from uuid import UUID

from ibex.config import EMBEDDED, Settings
from ibex.domain.identity import OrgId
from ibex.engines.addresses import StoreAddresses, resolve_addresses
from ibex.engines.datadir import DataDirectory
from ibex.engines.embedded import running_engines
from ibex.errors import ConfigurationError, ServerNotRunning
from ibex.pipeline.authentication import Authenticator
from ibex.pipeline.changes import ChangeFollower
from ibex.pipeline.directives import DirectiveBook
from ibex.pipeline.idempotency import Idempotency
from ibex.pipeline.models import ModelCatalog
from ibex.pipeline.rate_limiting import RateLimiter
from ibex.pipeline.routing import Router
from ibex.providers.openai import OpenAI
from ibex.recorder import Recorder
from ibex.stores.clickhouse.schema import ClickHouseSchema
from ibex.stores.clickhouse.traces import TraceStore
from ibex.stores.export import Exported, ExportLog, export_organization
from ibex.stores.journal.nudges import nudge_path
from ibex.stores.journal.writer import Journal
from ibex.stores.migrations import Migrator, find_migrations
from ibex.stores.postgres.changes import ChangeFeed, prune_changes
from ibex.stores.postgres.directives import DirectiveAdmin, DirectiveReader
from ibex.stores.postgres.erasure import OrganizationEraser
from ibex.stores.postgres.identity import IdentityAdmin, IdentityReader
from ibex.stores.postgres.identity_directory import IdentityDirectory
from ibex.stores.postgres.pool import Postgres
from ibex.stores.postgres.schema import postgres_migrator
from ibex.stores.postgres.sessions import SessionStore
from ibex.stores.redis.lane import RedisLane
from ibex.stores.redis.subscription import ChangeSubscription, publish_changes
from ibex.telemetry import Metrics, spawn

IDEMPOTENCY_SECONDS = 1.0
"""The deadline of the connection that carries kept replies: apart from the rate limit's, which they would hold up."""


class Neighbours(Protocol):
    """The other workers of this node (`ibex.server.control.Control`)."""

    on_share: Callable[[bytes], None] | None

    def share(self, payload: bytes, *, key: bytes | None = None) -> None:
        """Give them a payload, without waiting."""
        ...


@dataclass(frozen=True, kw_only=True)
class Worker:
    """What serves requests in one worker process; the HTTP edge is `ibex.server.edge.app`'s."""

    settings: Settings
    slot: int
    metrics: Metrics
    postgres: Postgres
    redis: RedisLane
    follower: ChangeFollower
    authenticator: Authenticator
    rate_limiter: RateLimiter
    directive_book: DirectiveBook
    providers: tuple[OpenAI, ...]
    router: Router
    models: ModelCatalog
    idempotency: Idempotency
    journal: Journal


@asynccontextmanager
async def open_worker(
    settings: Settings, *, slot: int, metrics: Metrics, neighbours: Neighbours
) -> AsyncIterator[Worker]:
    """Open what a worker needs; a store that is away delays nothing here.

    Raises OperatorError when it cannot serve at all: wrong settings, no journal.
    """
    addresses = resolve_addresses(settings)
    async with AsyncExitStack() as stack:
        journal = await _open_journal(stack, settings, slot)
        postgres = await _open_postgres(
            stack, addresses.postgres, f"ibex worker {slot}", settings.postgres_pool_size, metrics
        )
        redis = await _open_lane(stack, addresses.redis, settings.redis_deadline_ms / 1000)
        replies = await _open_lane(stack, addresses.redis, IDEMPOTENCY_SECONDS)
        rate_limiter = RateLimiter(redis, settings, metrics)
        _run_until_closed(stack, rate_limiter.run(), "node heartbeat")
        follower = _follow_changes(stack, settings, addresses, metrics)
        authenticator = Authenticator(
            IdentityReader(postgres),
            follower,
            metrics,
            cache_size=settings.auth_cache_size,
            accepts_dev_token=settings.is_development,
            share=neighbours.share,
            workers=settings.workers,
        )
        neighbours.on_share = authenticator.take_shared
        _run_until_closed(stack, authenticator.reread_forever(), "credential re-reads")
        providers = _open_providers(stack, settings, metrics)
        yield Worker(
            settings=settings,
            slot=slot,
            metrics=metrics,
            postgres=postgres,
            redis=redis,
            follower=follower,
            authenticator=authenticator,
            rate_limiter=rate_limiter,
            directive_book=DirectiveBook(DirectiveReader(postgres), follower, metrics),
            providers=providers,
            router=Router(providers),
            models=ModelCatalog(providers),
            idempotency=Idempotency(replies, metrics),
            journal=journal,
        )


@asynccontextmanager
async def open_recorder(settings: Settings, *, metrics: Metrics) -> AsyncIterator[tuple[Recorder, TraceStore]]:
    """Open the recorder and what it needs; a store that is away delays nothing here."""
    addresses = resolve_addresses(settings)
    async with AsyncExitStack() as stack:
        postgres = await _open_postgres(stack, addresses.postgres, "ibex recorder", 2, metrics)
        traces = await TraceStore.connect(addresses.clickhouse)
        stack.push_async_callback(traces.close)
        recorder = Recorder(
            settings,
            journal_dir=settings.journal_dir,
            sessions=SessionStore(postgres),
            traces=traces,
            metrics=metrics,
            prune=partial(prune_changes, postgres),
        )
        yield recorder, traces


class Operator:
    """What the command line works with: the stores, as their owner. Each is made when it is first asked for."""

    def __init__(self, settings: Settings, addresses: StoreAddresses, postgres: Postgres | None) -> None:
        self.settings = settings
        self.addresses = addresses
        self._postgres = postgres
        self._traces: TraceStore | None = None

    @cached_property
    def identity(self) -> IdentityAdmin:
        """Organizations, agents, tokens and limits."""
        return IdentityAdmin(self._owner)

    @cached_property
    def directory(self) -> IdentityDirectory:
        """Who there is: what `identity` changes, to look up."""
        return IdentityDirectory(self._owner)

    @cached_property
    def directives(self) -> DirectiveAdmin:
        """Directives and their versions."""
        return DirectiveAdmin(self._owner)

    @cached_property
    def sessions(self) -> SessionStore:
        """Sessions and checkpoints of all organizations."""
        return SessionStore(self._owner)

    @cached_property
    def eraser(self) -> OrganizationEraser:
        """The end of organizations in Postgres."""
        return OrganizationEraser(self._owner)

    def export(self, org_id: OrgId) -> AsyncIterator[Exported]:
        """Every row of an organization, from both stores."""
        return export_organization(self._owner, self.traces, org_id)

    @cached_property
    def exports(self) -> ExportLog:
        """What was given out of organizations."""
        return ExportLog(self._owner)

    @property
    def traces(self) -> TraceStore:
        """Traces, of the organizations each query names."""
        if self._traces is None:
            self._traces = TraceStore(self.addresses.clickhouse)
        return self._traces

    async def publish(self, changes: Iterable[tuple[str, UUID]]) -> bool:
        """Tell running servers at once what was committed, as (kind, id). False: they learn it a moment later."""
        url = self.addresses.redis or _running_redis(self.settings)
        return await publish_changes(url, changes) if url else False

    async def all_org_ids(self) -> list[OrgId]:
        """Every organization there is: the scope of an operator's query without `--org`."""
        return await self.identity.list_org_ids()

    async def close(self) -> None:
        """Close what was opened on the way."""
        if self._traces is not None:
            await self._traces.close()

    @property
    def _owner(self) -> Postgres:
        if self._postgres is None:
            raise RuntimeError("open_operator was told postgres=False")
        return self._postgres


@asynccontextmanager
async def open_operator(
    settings: Settings, *, postgres: bool = True, clickhouse: bool = False, redis: bool = False
) -> AsyncIterator[Operator]:
    """Open the stores a command needs.

    A running server's engines are used; without one, those needed are started, migrated and stopped again afterwards.
    Redis is started only for what is kept there (`redis`): without a server nobody listens to it.
    """
    wanted = {"postgres": postgres, "postgres_admin": postgres, "clickhouse": clickhouse, "redis": redis}
    stores = [store for store, is_wanted in wanted.items() if is_wanted]
    async with running_engines(settings, stores) as addresses, AsyncExitStack() as stack:
        if _runs_own_engines(settings):
            await migrate_embedded(settings, addresses, clickhouse=clickhouse, postgres=postgres)
        owner = await _open_postgres(stack, _admin_dsn(addresses), "ibexctl", 2, None) if postgres else None
        operator = Operator(settings, addresses, owner)
        stack.push_async_callback(operator.close)
        yield operator


async def migrate_embedded(
    settings: Settings, addresses: StoreAddresses, *, postgres: bool = True, clickhouse: bool = True
) -> list[str]:
    """Bring those databases up to date that are this data directory's own; answers what was applied."""
    applied = []
    if postgres and settings.postgres_dsn.get_secret_value() == EMBEDDED:
        async with postgres_migrator(addresses.postgres_admin) as migrator:
            applied += [f"postgres {migration.label}" for migration in await migrator.up()]
    if clickhouse and settings.clickhouse_dsn.get_secret_value() == EMBEDDED:
        async with clickhouse_migrator(addresses.clickhouse) as migrator:
            applied += [f"clickhouse {migration.label}" for migration in await migrator.up()]
    return applied


@asynccontextmanager
async def clickhouse_migrator(dsn: str) -> AsyncIterator[Migrator]:
    """The migrations of ClickHouse, on a connection of their own."""
    schema = ClickHouseSchema(dsn)
    try:
        yield Migrator(schema, find_migrations("clickhouse"))
    finally:
        await schema.close()


async def _open_journal(stack: AsyncExitStack, settings: Settings, slot: int) -> Journal:
    journal = Journal(
        settings.journal_dir,
        writer=f"worker-{slot}",
        sync=settings.journal_sync,
        segment_bytes=settings.journal_segment_bytes,
        segment_seconds=settings.journal_segment_seconds,
        max_bytes=settings.journal_max_bytes,
        min_free_bytes=settings.journal_min_free_bytes,
        max_age_seconds=settings.journal_max_age_seconds,
        nudge=nudge_path(settings.journal_dir),
    )
    journal.open()
    stack.push_async_callback(journal.close)
    return journal


async def _open_postgres(
    stack: AsyncExitStack, dsn: str, name: str, max_size: int, metrics: Metrics | None
) -> Postgres:
    postgres = await Postgres.connect(dsn, name=name, max_size=max_size, metrics=metrics)
    stack.push_async_callback(postgres.close)
    return postgres


async def _open_lane(stack: AsyncExitStack, url: str, deadline: float) -> RedisLane:
    lane = RedisLane(url, deadline=deadline)
    stack.push_async_callback(lane.close)
    await lane.connect()
    return lane


def _follow_changes(
    stack: AsyncExitStack, settings: Settings, addresses: StoreAddresses, metrics: Metrics
) -> ChangeFollower:
    subscription = ChangeSubscription(addresses.redis, lambda kind, entity_id: follower.take(kind, entity_id))
    follower = ChangeFollower(
        ChangeFeed(addresses.postgres), subscription, metrics, max_stale_seconds=settings.auth_max_stale_seconds
    )
    stack.push_async_callback(follower.close)
    _run_until_closed(stack, subscription.run(), "change subscription")
    _run_until_closed(stack, follower.run(), "change feed")
    return follower


def _open_providers(stack: AsyncExitStack, settings: Settings, metrics: Metrics) -> tuple[OpenAI, ...]:
    """The sandbox alone, or OpenAI when a key, or an address other than OpenAI's own, says how to reach it."""
    default_url = Settings.model_fields["openai_base_url"].default
    is_sandbox = settings.resolved_llm_mode == "sandbox"
    if not is_sandbox and settings.openai_api_key is None and settings.openai_base_url == default_url:
        return ()
    try:
        provider = OpenAI(
            settings,
            metrics,
            base_url=settings.openai_base_url,
            api_key=None if is_sandbox else settings.openai_api_key,
            name="sandbox" if is_sandbox else "openai",
        )
    except ValueError as error:
        raise ConfigurationError(str(error), hint="See the section on providers in .env.example.") from None
    stack.push_async_callback(provider.close)
    return (provider,)


def _run_until_closed(stack: AsyncExitStack, coroutine: Coroutine[None, None, None], name: str) -> None:
    task = spawn(coroutine, name=name)

    async def cancel() -> None:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    stack.push_async_callback(cancel)


def _admin_dsn(addresses: StoreAddresses) -> str:
    if not addresses.postgres_admin:
        raise ConfigurationError(
            "IBEX_POSTGRES_ADMIN_DSN is not set: operator commands work as the database's owner.",
            hint="Set it to the address of the same database, with the role ibex_owner.",
        )
    return addresses.postgres_admin


def _runs_own_engines(settings: Settings) -> bool:
    holder = DataDirectory(settings.data_dir).holder()
    return holder is not None and holder.process.pid == os.getpid()


def _running_redis(settings: Settings) -> str:
    try:
        return resolve_addresses(settings).redis
    except ServerNotRunning:
        return ""
