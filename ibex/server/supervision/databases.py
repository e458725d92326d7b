"""What must be true of the stores before workers start: migrated where they are this server's own, else checked."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from ibex.config import EMBEDDED, Settings
from ibex.domain.identity import DEV_TOKEN_ID
from ibex.engines.addresses import StoreAddresses
from ibex.errors import ConfigurationError, OperatorError, StoreError, StoreUnavailable
from ibex.runtime import clickhouse_migrator, migrate_embedded
from ibex.stores.postgres.identity import IdentityReader
from ibex.stores.postgres.pool import Postgres
from ibex.stores.postgres.roles import refuse_powerful_role
from ibex.stores.postgres.schema import check_schema, seed_development
from ibex.stores.redis.lane import RedisLane
from ibex.stores.redis.rate_limits import BEAT_DEADLINE, check_eviction_policy

log = logging.getLogger("ibex.supervisor")

WAIT_SECONDS = 30.0
"""How long a store that is away is waited for: containers start in any order."""


_DELETE_TOKEN = f"delete from ibex_core.tokens where token_id = '{DEV_TOKEN_ID}'"  # noqa: S608 (shown, and never run)


async def prepare_databases(settings: Settings, addresses: StoreAddresses) -> None:
    """Migrate (and in development seed) the embedded databases; check real ones, which `serve` never changes.

    Raises SchemaMismatch when a real database's schema is not this version's, OperatorError when Postgres does not
    answer, and outside development ConfigurationError when a store is not safe to serve on.
    """
    applied = await migrate_embedded(settings, addresses)
    if applied:
        log.info("migrated", extra={"applied": ", ".join(applied)})
    if settings.postgres_dsn.get_secret_value() == EMBEDDED and settings.is_development:
        await seed_development(addresses.postgres_admin)
    await check_record_stores(settings, addresses)
    if not settings.is_development:
        await _refuse_forgetful_redis(settings, addresses.redis)


async def check_record_stores(settings: Settings, addresses: StoreAddresses) -> None:
    """Check Postgres and ClickHouse, where turns are recorded, without changing them.

    Raises as `prepare_databases` does.
    """
    if settings.postgres_dsn.get_secret_value() != EMBEDDED:
        await _wait_for("Postgres", lambda: check_schema(addresses.postgres))
    if settings.clickhouse_dsn.get_secret_value() != EMBEDDED:
        await _check_clickhouse(addresses.clickhouse)
    if not settings.is_development:
        await _wait_for("Postgres", lambda: _refuse_unsafe_postgres(addresses.postgres))


async def _check_clickhouse(dsn: str) -> None:
    """Traces wait in the journal while ClickHouse is away, so its absence hinders no start."""
    try:
        async with clickhouse_migrator(dsn) as migrator:
            await migrator.check()
    except StoreError as error:
        log.warning("clickhouse was not checked", extra={"reason": error.message})


async def _refuse_unsafe_postgres(dsn: str) -> None:
    postgres = await Postgres.connect(dsn, name="ibex serve")
    try:
        await refuse_powerful_role(postgres)
        await refuse_development_token(postgres)
    finally:
        await postgres.close()


async def refuse_development_token(postgres: Postgres) -> None:
    """Raise ConfigurationError when the database would let the token in that everybody knows."""
    if await IdentityReader(postgres).has_development_token():
        raise ConfigurationError(
            "The development token is in this database, and IBEX_ENV is not development: everybody knows that token.",
            hint=f"Use a database that was never seeded, or as its owner: {_DELETE_TOKEN}",
        )


async def _refuse_forgetful_redis(settings: Settings, url: str) -> None:
    """Limits are kept in the workers while Redis is away, so its absence hinders no start."""
    lane = RedisLane(url, deadline=BEAT_DEADLINE)
    try:
        await lane.connect()
        await check_eviction_policy(lane, settings)
    except StoreUnavailable as error:
        log.warning("redis was not checked", extra={"reason": error.message})
    finally:
        await lane.close()


async def _wait_for(name: str, check: Callable[[], Awaitable[None]]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    is_said = False
    while True:
        try:
            return await check()
        except StoreUnavailable as error:
            if time.monotonic() > deadline:
                raise OperatorError(f"{name} does not answer: {error.message}", hint="Is its DSN right?") from error
        except StoreError as error:
            raise OperatorError(f"{name}: {error.message}") from error
        if not is_said:
            log.warning("waiting for a store", extra={"store": name, "seconds": WAIT_SECONDS})
            is_said = True
        await asyncio.sleep(0.5)
