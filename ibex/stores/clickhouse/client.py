"""One ClickHouse database over its HTTP interface: the address, the client, and its errors as ibex's."""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

import aiohttp
from clickhouse_connect import get_async_client
from clickhouse_connect.driver import options
from clickhouse_connect.driver.asyncclient import AsyncClient
from clickhouse_connect.driver.exceptions import ClickHouseError, DataError, Error

from ibex.errors import ConfigurationError, StoreRefused, StoreUnavailable

# The driver's first insert would import pandas, if it is there at all, to ask whether the rows are a data frame: more
# than a second in which the event loop stands still, and the first traces and checkpoints wait.
options.pd = options.pd_time_test = options.np = None

logging.getLogger("clickhouse_connect").setLevel(logging.CRITICAL)  # it logs, with tracebacks, what it then raises

DEFAULT_DATABASE = "ibex"
_CONNECT_SECONDS = 2.0
_ANSWER_SECONDS = 30.0

_ABOUT_CONTENT = frozenset({6, 26, 27, 38, 41, 69, 70, 72, 117, 131, 321, 349, 407, 469})
"""ClickHouse's codes for "this row cannot be stored". All others are about the server, the schema or the account, and
pass: rows wait for them."""
NO_SCHEMA = frozenset({60, 81})
"""Unknown table, unknown database."""


@dataclass(frozen=True)
class ClickHouseAddress:
    """Where ClickHouse's HTTP interface is. The DSN holds a password, so it has no repr."""

    dsn: str
    interface: str
    database: str

    @classmethod
    def parse(cls, dsn: str) -> "ClickHouseAddress":
        """Read `http(s)://user:password@host:port/database` (or `clickhouse(s)://`). Raises ConfigurationError."""
        parts = urlsplit(dsn)
        interface = {"http": "http", "https": "https", "clickhouse": "http", "clickhouses": "https"}.get(parts.scheme)
        if interface is None or not parts.hostname:
            raise ConfigurationError("IBEX_CLICKHOUSE_DSN must look like http://user:password@host:8123/database.")
        return cls(dsn, interface, unquote(parts.path.strip("/")) or DEFAULT_DATABASE)

    def __repr__(self) -> str:
        return f"ClickHouseAddress({self.interface}, database={self.database})"


class ClickHouse:
    """A client of one ClickHouse database, connected when it is first needed and again after a failure to connect."""

    def __init__(self, address: ClickHouseAddress, *, in_database: bool = True) -> None:
        self._address = address
        self._in_database = in_database
        self._client: AsyncClient | None = None
        self._connecting = asyncio.Lock()

    async def client(self) -> AsyncClient:
        """The connected client; call it inside `translated`."""
        async with self._connecting:
            if self._client is None:
                self._client = await get_async_client(
                    dsn=self._address.dsn,
                    interface=self._address.interface,
                    database=self._address.database if self._in_database else "default",
                    connect_timeout=_CONNECT_SECONDS,
                    send_receive_timeout=_ANSWER_SECONDS,
                    query_retries=0,
                    compress=False,
                    tz_mode="aware",
                )
            return self._client

    async def close(self) -> None:
        """Close the connections."""
        client, self._client = self._client, None
        if client is not None:
            await client.close()


@contextmanager
def translated() -> Iterator[None]:
    """Turn the driver's errors into StoreUnavailable or StoreRefused, without ClickHouse's text: it may quote a row."""
    try:
        yield
    except DataError as error:
        raise StoreRefused("A value does not fit its ClickHouse column.") from error
    except Error as error:
        text = (
            f"ClickHouse answered {error.name or 'an error'} ({error.code})." if error.code else "ClickHouse is away."
        )
        if error.code in _ABOUT_CONTENT:
            raise StoreRefused(text) from error
        if error.code in NO_SCHEMA:
            text += " Its schema is missing: run `ibexctl migrate up`."
        raise StoreUnavailable(text) from error
    except (ClickHouseError, aiohttp.ClientError, OSError) as error:
        raise StoreUnavailable("ClickHouse is away.") from error
    except TimeoutError as error:
        raise StoreUnavailable("ClickHouse did not answer in time.") from error
