"""What decides who is let in, on a real Postgres behind a relay and a real Valkey."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import NoReturn
from uuid import UUID

import pytest

from ibex.domain.identity import Principal
from ibex.errors import RequestError
from ibex.pipeline.authentication import Authenticator
from ibex.pipeline.changes import ChangeFollower, now
from ibex.pipeline.directives import DirectiveBook
from ibex.pipeline.principals import Entry
from ibex.stores.postgres.directives import DirectiveAdmin
from ibex.stores.postgres.identity import IdentityAdmin
from ibex.stores.postgres.pool import Postgres
from ibex.stores.redis.subscription import ChangeSubscription, publish_changes
from ibex.telemetry import Metrics, spawn
from tests.conftest import PostgresDatabase
from tests.pipeline.readers import WatchedDirectiveReader, WatchedFeed, WatchedReader
from tests.relays import Relay, relayed
from tests.tenants import Tenant, make_tenant
from tests.valkey import Valkey, run_valkey
from tests.waiting import eventually


@pytest.fixture
def own_valkey() -> Iterator[Valkey]:
    """A Valkey that may be stopped and frozen."""
    with run_valkey() as server:
        yield server


@dataclass
class Door:
    """What one worker decides by, without its HTTP edge. Nothing polls or rereads unless a test says so."""

    relay: Relay
    """The way to Postgres of the worker, not of the operators."""
    valkey: Valkey
    feed: WatchedFeed
    subscription: ChangeSubscription
    follower: ChangeFollower
    reader: WatchedReader
    authenticator: Authenticator
    directive_reader: WatchedDirectiveReader
    book: DirectiveBook
    metrics: Metrics
    admin: IdentityAdmin
    directives: DirectiveAdmin
    tenant: Tenant
    shared: list[bytes] = field(default_factory=list)
    """What it told its neighbours."""
    tasks: list[asyncio.Task[NoReturn]] = field(default_factory=list)

    async def enter(
        self,
        bearer: str | None = None,
        agent: object = None,
        *,
        address: str = "192.0.2.1",
        **needs: int,
    ) -> Principal:
        """Present the tenant's token and agent, or these."""
        return await self.authenticator.authenticate(
            f"Bearer {self.tenant.bearer if bearer is None else bearer}",
            str(self.tenant.agent_id if agent is None else agent),
            address,
            **needs,
        )

    async def refuse(self, error: type[RequestError], bearer: str | None = None, agent: object = None) -> None:
        """Present these, and be refused in this way."""
        with pytest.raises(RequestError) as caught:
            await self.enter(bearer, agent)
        assert type(caught.value) is error

    async def revoke(self) -> None:
        """Revoke the tenant's token, and hear of it."""
        await self.admin.revoke_token(self.tenant.token_id)
        await self.poll()

    @property
    def entry(self) -> Entry | None:
        """What is remembered of the caller used longest ago."""
        return next(iter(self.authenticator._cache._entries.values()), None)

    async def poll(self) -> None:
        """Ask Postgres once for what has changed."""
        await self.follower._ask()

    async def publish(self, kind: str, entity_id: UUID) -> None:
        """Tell a change through Redis, and wait until it is in force."""
        heard: list[UUID | None] = []
        self.follower.listen(lambda _, changed: heard.append(changed))
        assert await publish_changes(self.valkey.url, [(kind, entity_id)])
        await eventually(lambda: entity_id in heard)

    async def hear_redis(self) -> None:
        """Have a subscription that has been open for long, and an answer of Postgres."""
        self.tasks.append(spawn(self.subscription.run(), name="test subscription"))
        await eventually(lambda: self.subscription.last_pong_sent_at)
        self.subscription.unbroken_since = now() - 1000
        await self.poll()

    def grow_old(self, seconds: float = 6.0) -> None:
        """Let what was heard be older, as when the event loop stood still."""
        self.follower._heard_at -= seconds

    async def lose_postgres(self) -> None:
        """Have Postgres refuse this worker, which has noticed, and what it heard be old."""
        await self.relay.stop()
        await self.poll()
        self.grow_old()


@pytest.fixture
async def door(postgres_database: PostgresDatabase, own_valkey: Valkey) -> AsyncIterator[Door]:
    """A worker's decisions, after its first answer of the change feed."""
    async with AsyncExitStack() as stack:
        relay = await stack.enter_async_context(relayed(postgres_database.dsn))
        owner = await Postgres.connect(postgres_database.admin_dsn, name="test owner")
        stack.push_async_callback(owner.close)
        app = await Postgres.connect(relay.dsn, name="test worker")
        stack.push_async_callback(app.close)
        admin = IdentityAdmin(owner)
        metrics = Metrics()
        feed = WatchedFeed(relay.dsn)
        subscription = ChangeSubscription(own_valkey.url, lambda kind, entity_id: follower.take(kind, entity_id))
        follower = ChangeFollower(feed, subscription, metrics, max_stale_seconds=900)
        stack.push_async_callback(follower.close)
        reader, directive_reader = WatchedReader(app), WatchedDirectiveReader(app)
        shared: list[bytes] = []
        authenticator = Authenticator(
            reader,
            follower,
            metrics,
            cache_size=100,
            accepts_dev_token=False,
            share=lambda payload, key=None: shared.append(payload),
        )
        door = Door(
            relay, own_valkey, feed, subscription, follower, reader, authenticator, directive_reader,
            DirectiveBook(directive_reader, follower, metrics), metrics, admin, DirectiveAdmin(owner),
            await make_tenant(admin, "acme"), shared,
        )  # fmt: skip
        await door.poll()
        yield door
        relay.release()
        for task in door.tasks:
            task.cancel()
        await asyncio.gather(*door.tasks, return_exceptions=True)
