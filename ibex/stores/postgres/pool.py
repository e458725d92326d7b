"""A pool of Postgres connections as one role, and the one place where a driver's error becomes ibex's."""

import asyncio
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Self, TypeAlias
from uuid import UUID

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from ibex.domain.identity import OrgId, TokenId
from ibex.errors import IbexError, StoreError, StoreRefused, StoreUnavailable
from ibex.stores.postgres.address import PostgresAddress
from ibex.telemetry import Metrics

Connection: TypeAlias = "PoolConnectionProxy[asyncpg.Record]"

_CONNECT_SECONDS = 5.0

_UNAVAILABLE_CLASSES = {"08", "3D", "40", "53", "57", "58", "XX"}
_UNAVAILABLE_STATES = {"25006", "55P03"}
"""Errors that speak of the server, not of what it was asked: connections, roll-backs by deadlock, resources,
shutdowns, disks; a server that is read only (in recovery), a lock not had in time."""

_CONTENT_CLASSES = {"22", "23"}
"""Classes of errors whose text may quote the data that was sent."""


@contextmanager
def translated() -> Iterator[None]:
    """Turn what asyncpg and the socket raise into StoreUnavailable or StoreRefused.

    The message never quotes data, nor does the cause that is kept.
    """
    try:
        yield
    except asyncpg.PostgresError as error:
        raise _translate(error) from _presentable(error)
    except TimeoutError as error:
        raise StoreUnavailable("Postgres did not answer in time.") from error
    except asyncpg.ClientConfigurationError:  # its text quotes the DSN
        raise StoreRefused("The Postgres DSN cannot be read.") from None
    except asyncpg.InterfaceError as error:
        if isinstance(error, ValueError):  # the client's own refusal of an argument; its text quotes the value
            raise StoreRefused(f"Postgres cannot be sent this ({type(error).__name__}).") from None
        raise StoreUnavailable(f"Postgres is not available ({type(error).__name__}).") from error
    except OSError as error:
        raise StoreUnavailable(f"Postgres cannot be reached: {_reason(error)}.") from error
    except asyncpg.InternalClientError as error:
        raise StoreUnavailable(f"Postgres is not available ({type(error).__name__}).") from error


def _reason(error: OSError) -> str:
    """Why there is no connection, without the address: the words of asyncio quote it."""
    match error:
        case socket.gaierror():
            return "its host name is unknown"
        case ConnectionRefusedError():
            return "nobody listens there"
        case ssl.SSLError():
            return "TLS failed"
        case _:
            return os.strerror(error.errno).lower() if error.errno else "none of its addresses answers"


def is_content_error(error: BaseException) -> bool:
    """Whether the driver blames the data that was sent, and not the server or the statement."""
    if isinstance(error, asyncpg.PostgresError):
        return (error.sqlstate or "")[:2] in _CONTENT_CLASSES
    return isinstance(error, asyncpg.InterfaceError) and isinstance(error, ValueError)


def _translate(error: asyncpg.PostgresError) -> StoreError:
    state = error.sqlstate or ""
    if state[:2] == "28":
        return StoreUnavailable(f"Postgres refused the log-in ({type(error).__name__}, {state}).")
    is_stale = isinstance(error, asyncpg.InvalidCachedStatementError)  # a migration ran meanwhile; it is prepared anew
    if is_stale or state[:2] in _UNAVAILABLE_CLASSES or state in _UNAVAILABLE_STATES:
        return StoreUnavailable(f"Postgres is not available ({type(error).__name__}, {state}).")
    if state == "26000":
        return StoreRefused("A pooler stands before Postgres: its DSN needs the parameter pgbouncer=true.")
    return StoreRefused(f"Postgres refused the statement ({type(error).__name__}, {state}).")


def _presentable(error: asyncpg.PostgresError) -> asyncpg.PostgresError | None:
    if is_content_error(error):
        return None
    error.detail = error.hint = None
    return error


class Postgres:
    """A pool of connections as one role. A store that is away delays no start and is used again once it is back."""

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]", metrics: Metrics | None) -> None:
        self._pool = pool
        self._metrics = metrics

    @classmethod
    async def connect(
        cls, dsn: str, *, name: str, min_size: int = 1, max_size: int = 4, metrics: Metrics | None = None
    ) -> Self:
        """Make a pool of at most `max_size` connections that Postgres knows as `name`.

        Up to `min_size` are opened now if Postgres answers within a second; if it does not, this succeeds all the same.
        """
        address = PostgresAddress.parse(dsn)
        with translated():
            pool = await asyncpg.create_pool(
                address.dsn,
                init_size=0,
                min_size=0,
                max_size=max(min_size, max_size),
                max_inactive_connection_lifetime=0,
                reset=_keep,
                timeout=_CONNECT_SECONDS,
                server_settings={"application_name": name[:63]},
                **address.options,
            )
        self = cls(pool, metrics)
        await self._warm_up(min_size)
        return self

    async def close(self) -> None:
        """Close every connection; those still in use after two seconds are cut."""
        try:
            async with asyncio.timeout(2):
                await self._pool.close()
        except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            self._pool.terminate()

    @asynccontextmanager
    async def transaction(
        self,
        *,
        org_ids: Iterable[OrgId] = (),
        token_id: TokenId | None = None,
        timeout: float = 5,
        operation: str = "transaction",
    ) -> AsyncIterator[Connection]:
        """A READ COMMITTED transaction that sees the rows of `org_ids`, the row of `token_id`, and no others.

        It commits at the end and rolls back on an error. `timeout` (s) covers all of it, waiting for a connection too.
        Raises StoreUnavailable or StoreRefused: nothing but statements belongs inside. `operation` labels the metric.
        """
        started = time.perf_counter()
        try:
            with translated():
                async with asyncio.timeout(timeout), self._checked_out() as connection:
                    await connection.execute(_begin(org_ids, token_id, timeout))
                    yield connection
                    if await connection.execute("commit") != "COMMIT":
                        # Postgres answers COMMIT with ROLLBACK when a statement failed and its error was swallowed.
                        raise StoreRefused("Postgres rolled the transaction back.")
        finally:
            self._observe(operation, time.perf_counter() - started)

    @asynccontextmanager
    async def _checked_out(self) -> AsyncIterator[Connection]:
        connection = await self._pool.acquire()
        try:
            yield connection
        except (asyncpg.PostgresError, IbexError):
            await _roll_back(connection)
            raise
        except BaseException:
            # A statement may be under way, or the server hang: a release would wait for its answer.
            connection.terminate()
            raise
        finally:
            await self._pool.release(connection)

    async def _warm_up(self, size: int) -> None:
        try:
            async with asyncio.timeout(1), AsyncExitStack() as stack:
                for _ in range(size):
                    await stack.enter_async_context(self.transaction(operation="connect"))
        except (StoreError, TimeoutError):
            return

    def _observe(self, operation: str, seconds: float) -> None:
        if self._metrics is None:
            return
        self._metrics.db_query_duration_seconds.labels(operation).observe(seconds)
        idle = self._pool.get_idle_size()
        self._metrics.db_pool_open_connections.labels("idle").set(idle)
        self._metrics.db_pool_open_connections.labels("in_use").set(self._pool.get_size() - idle)


def _begin(org_ids: Iterable[OrgId], token_id: TokenId | None, timeout: float) -> str:
    """One message, hence one round trip; only UUIDs reach its text."""
    organizations = ",".join(str(UUID(bytes=org_id.bytes)) for org_id in org_ids)
    token = str(UUID(bytes=token_id.bytes)) if token_id else ""
    return (
        "begin isolation level read committed;"
        f"set local statement_timeout = {max(1, int(timeout * 1000))};"
        f"select set_config('ibex.org_ids', '{organizations}', true), set_config('ibex.token_id', '{token}', true)"
    )


async def _roll_back(connection: Connection) -> None:
    try:
        await connection.execute("rollback")
    except BaseException:
        # Whatever went wrong, a connection in an unknown state must not go back to the pool.
        connection.terminate()
        raise


async def _keep(connection: object) -> None:
    """All state of a connection is local to its transaction: nothing to reset, hence no round trip."""
