"""What `ibexctl config check` asks each store about itself."""

import re
import time
from dataclasses import dataclass

from hiredis import ReplyError

from ibex.stores.clickhouse.client import ClickHouse, ClickHouseAddress, translated
from ibex.stores.postgres.pool import Postgres
from ibex.stores.postgres.roles import RoleRights, read_rights
from ibex.stores.redis.connection import Argument, RedisAddress, borrow_connection, translate_reply

_REDIS_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class PostgresFacts:
    """A Postgres, and the role that a DSN logs in as."""

    version: str
    database: str
    rights: RoleRights
    clock_skew: float
    """Seconds by which the server's clock is ahead of this machine's."""
    clock_error: float
    """Seconds by which `clock_skew` may be wrong."""


@dataclass(frozen=True, slots=True)
class RedisFacts:
    """A Redis or Valkey."""

    version: str
    eviction_policy: str | None
    """None when it does not say."""


@dataclass(frozen=True, slots=True)
class ClickHouseFacts:
    """A ClickHouse, and the traces' table."""

    version: str
    deduplication_window: int | None
    """How many inserted blocks it remembers; None when there is no table."""


async def probe_postgres(dsn: str) -> PostgresFacts:
    """Raises StoreError when it cannot be asked."""
    postgres = await Postgres.connect(dsn, name="ibexctl config check", max_size=1)
    try:
        rights = await read_rights(postgres)
        async with postgres.transaction(operation="probe") as connection:
            version = await connection.fetchval("show server_version")
            database = await connection.fetchval("select current_database()")
            began = time.time()
            theirs = await connection.fetchval("select extract(epoch from clock_timestamp())::float8")
            ended = time.time()
    finally:
        await postgres.close()
    skew, error = theirs - (began + ended) / 2, (ended - began) / 2
    return PostgresFacts(version.partition(" ")[0], database, rights, skew, error)


async def probe_redis(url: str) -> RedisFacts:
    """Raises StoreError when it cannot be asked, ConfigurationError when the URL is none."""
    async with borrow_connection(RedisAddress.parse(url), seconds=_REDIS_SECONDS) as connection:
        commands: list[tuple[Argument, ...]] = [("PING",), ("INFO", "server"), ("INFO", "memory")]
        pong, *infos = await connection.exchange(commands)
    if isinstance(pong, ReplyError):
        raise translate_reply(pong)
    known = {"redis_version": "of unknown version"}
    for info in infos:
        if not isinstance(info, ReplyError):  # an ACL may forbid INFO
            known |= dict(line.split(":", 1) for line in bytes(info).decode().splitlines() if ":" in line)
    return RedisFacts(known.get("valkey_version", known["redis_version"]), known.get("maxmemory_policy"))


async def probe_clickhouse(dsn: str) -> ClickHouseFacts:
    """Raises StoreError when it cannot be asked, ConfigurationError when the DSN is none."""
    address = ClickHouseAddress.parse(dsn)
    clickhouse = ClickHouse(address, in_database=False)
    try:
        with translated():
            client = await clickhouse.client()
            version = (await client.query("select version()")).result_rows[0][0]
            tables = await client.query(
                "select engine_full from system.tables where database = {database:String} and name = 'llm_traces'",
                parameters={"database": address.database},
            )
    finally:
        await clickhouse.close()
    return ClickHouseFacts(version, _read_window(tables.result_rows[0][0]) if tables.result_rows else None)


def _read_window(engine: str) -> int:
    """The deduplication window of a table, from the engine's full text; a plain MergeTree without the setting has none,
    a replicated one has a thousand blocks.
    """
    is_replicated = engine.startswith(("Replicated", "Shared"))
    name = "replicated_deduplication_window" if is_replicated else "non_replicated_deduplication_window"
    found = re.search(rf"\b{name} = (\d+)", engine)
    return int(found[1]) if found else 1000 if is_replicated else 0
