"""One connection to Redis or Valkey: its address, its greeting, commands out, replies in the order of the commands."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import hiredis

from ibex.errors import ConfigurationError, StoreError, StoreRefused, StoreUnavailable

CONNECT_SECONDS = 1.0
"""How long a connection may take, its greeting included."""

CLIENT_NAME = "ibex"

Argument = bytes | str | int

pack_command: Callable[[tuple[Argument, ...]], bytes] = hiredis.pack_command  # type: ignore[assignment]
"""A command in RESP. hiredis' own annotation allows a single argument alone."""

_INCOMPLETE = object()
_HINT = "Write redis://[user:password@]host[:port][/db], rediss://… for TLS, or unix:///path[?db=n]."
_PASSING = frozenset(
    {"LOADING", "BUSY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "READONLY", "OOM", "MISCONF", "NOREPLICAS"}
)
"""Error codes of a server that may well answer the same command later."""


class RedisRefused(StoreRefused):
    """Redis refused a command."""

    def __init__(self, code: str) -> None:
        super().__init__(f"Redis refused a command: {code}.")
        self.code = code
        """The error's first word (`NOSCRIPT`, `NOPERM`, `ERR` …); the rest may quote the command and is dropped."""


class RedisPassing(StoreUnavailable):
    """Redis is there and cannot serve just now."""

    def __init__(self, code: str) -> None:
        super().__init__(f"Redis cannot serve just now: {code}.")
        self.code = code


def translate_reply(error: hiredis.ReplyError) -> StoreError:
    """The error that a Redis error reply stands for."""
    text = str(error)
    code = text.partition(" ")[0]
    if code == "ERR" and "unknown command" in text:
        code = "NOCOMMAND"
    return RedisPassing(code) if code in _PASSING else RedisRefused(code)


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """Where a Redis is and who connects to it."""

    host: str = "127.0.0.1"
    port: int = 6379
    path: str | None = None
    """A unix socket; host and port mean nothing then."""
    is_tls: bool = False
    ca_file: str | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    database: int = 0

    @classmethod
    def parse(cls, url: str) -> "RedisAddress":
        """Read a `redis://`, `rediss://` or `unix://` URL; raises ConfigurationError, which never quotes the URL."""
        try:
            parts = urlsplit(url)
            query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
            if parts.scheme not in {"redis", "rediss", "unix"}:
                raise ValueError
            is_unix = parts.scheme == "unix"
            # a relative socket path has its first directory where a URL has the host
            path = parts.netloc.rpartition("@")[2] + unquote(parts.path) if is_unix else None
            database = query.get("db") or ("" if is_unix else parts.path.strip("/")) or "0"
            address = cls(
                host=("" if is_unix else parts.hostname) or "127.0.0.1",
                port=6379 if is_unix else parts.port or 6379,
                path=path,
                is_tls=parts.scheme == "rediss",
                ca_file=query.get("ssl_ca_certs"),
                username=unquote(parts.username) if parts.username else query.get("username"),
                password=unquote(parts.password) if parts.password else query.get("password"),
                database=int(database),
            )
        except ValueError:
            raise ConfigurationError("IBEX_REDIS_URL is not the address of a Redis.", hint=_HINT) from None
        if is_unix and not path:
            raise ConfigurationError("IBEX_REDIS_URL names no socket.", hint=_HINT)
        return address

    @property
    def greeting(self) -> list[tuple[Argument, ...]]:
        """The commands that open a connection. RESP 2 is spoken, so that no `HELLO` is needed and any server serves."""
        commands: list[tuple[Argument, ...]] = []
        if self.password is not None:
            commands.append(("AUTH", self.username, self.password) if self.username else ("AUTH", self.password))
        if self.database:
            commands.append(("SELECT", self.database))
        return [*commands, ("CLIENT", "SETNAME", CLIENT_NAME)]


class RedisConnection(asyncio.Protocol):
    """The wire. Whoever owns it sets `on_reply` and `on_lost`."""

    def __init__(self) -> None:
        self._reader = hiredis.Reader(notEnoughData=_INCOMPLETE)
        self._transport: asyncio.Transport | None = None
        self.on_reply: Callable[[Any], None] = lambda _: None
        """Gets each reply in order; an error reply is a `hiredis.ReplyError` value."""
        self.on_lost: Callable[[], None] = lambda: None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        """Called by the event loop with whatever has come."""
        reader = self._reader
        try:
            reader.feed(data)
            while (reply := reader.gets()) is not _INCOMPLETE:
                self.on_reply(reply)
        except hiredis.ProtocolError:
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 (the event loop's signature)
        """Called by the event loop, once."""
        self.on_lost()

    def write(self, data: bytes) -> None:
        """Send packed commands."""
        if self._transport is not None:
            self._transport.write(data)

    def abort(self) -> None:
        """Close without waiting for anything; `on_lost` follows."""
        if self._transport is not None:
            self._transport.abort()

    async def exchange(self, commands: Sequence[tuple[Argument, ...]]) -> list[Any]:
        """Send commands and wait for all their replies; raises StoreUnavailable when the connection is lost."""
        replies: list[Any] = []
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def take(reply: Any) -> None:
            replies.append(reply)
            if len(replies) == len(commands) and not done.done():
                done.set_result(None)

        def lose() -> None:
            if not done.done():
                done.set_exception(StoreUnavailable("Redis closed the connection."))

        self.on_reply, self.on_lost = take, lose
        self.write(b"".join(pack_command(command) for command in commands))
        await done
        return replies


@asynccontextmanager
async def borrow_connection(address: RedisAddress, *, seconds: float) -> AsyncIterator[RedisConnection]:
    """A connection for as long as the block runs, at most so long (s); raises StoreError."""
    with _translated():
        async with asyncio.timeout(seconds):
            connection = await open_connection(address)
            try:
                yield connection
            finally:
                close_connection(connection)


def close_connection(connection: RedisConnection) -> None:
    """Close without waiting for anything; its owner hears no more of it."""
    connection.on_reply, connection.on_lost = lambda _: None, lambda: None
    connection.abort()


async def open_connection(address: RedisAddress) -> RedisConnection:
    """Connect and greet within a second; raises StoreUnavailable, or RedisRefused when Redis does not let us in."""
    connection = RedisConnection()
    try:
        with _translated():
            async with asyncio.timeout(CONNECT_SECONDS):
                await _connect(address, connection)
                await _greet(address, connection)
    except BaseException:  # failed or cancelled: a connection nobody holds is closed
        close_connection(connection)
        raise
    return connection


async def _greet(address: RedisAddress, connection: RedisConnection) -> None:
    commands = address.greeting
    for command, reply in zip(commands, await connection.exchange(commands), strict=True):
        # an ACL may forbid CLIENT SETNAME, and a connection without a name is as good
        if isinstance(reply, hiredis.ReplyError) and command[0] != "CLIENT":
            raise translate_reply(reply)


async def _connect(address: RedisAddress, connection: RedisConnection) -> None:
    loop = asyncio.get_running_loop()
    if address.path is not None:
        await loop.create_unix_connection(lambda: connection, address.path)
        return
    context = ssl.create_default_context(cafile=address.ca_file) if address.is_tls else None
    await loop.create_connection(lambda: connection, address.host, address.port, ssl=context)


@contextmanager
def _translated() -> Iterator[None]:
    """Errors of sockets, TLS and deadlines become StoreUnavailable."""
    try:
        yield
    except TimeoutError as error:
        raise StoreUnavailable("Redis did not answer in time.") from error
    except OSError as error:
        raise StoreUnavailable(f"Redis cannot be reached: {type(error).__name__}.") from error
