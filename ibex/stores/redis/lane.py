"""The lean lane of the hot path: one Redis connection, one write for all commands of an event-loop tick."""

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha1
from typing import Any

import hiredis

from ibex.errors import StoreError, StoreUnavailable
from ibex.stores.redis.connection import (
    Argument,
    RedisAddress,
    RedisConnection,
    RedisRefused,
    close_connection,
    open_connection,
    pack_command,
    translate_reply,
)
from ibex.telemetry import spawn

log = logging.getLogger("ibex.redis")

OnReply = Callable[[Any], None]
"""Gets a command's reply, or the StoreError that stands for it. Called exactly once, from the event loop."""

GRACE_SECONDS = 0.002
"""From a deadline to its verdict. An event loop that stalled must not look like a Redis that did: in this time it reads
what lies in the socket, and sends what it had not sent yet."""

MISSES_BEFORE_RECONNECT = 3
"""Verdicts in a row, without one reply between them, after which the connection itself is suspected."""

LEAST_PAUSE, LONGEST_PAUSE = 0.05, 1.0
"""Seconds between two attempts to connect."""


class _Call:
    """One command on its way. `due` is a deadline in seconds until it is sent, then the loop's time."""

    __slots__ = ("due", "on_reply")

    def __init__(self, on_reply: OnReply | None, due: float) -> None:
        self.on_reply = on_reply
        self.due = due


class RedisLane:
    """One connection, kept up in the background. Replies are matched to commands by their order.

    A command fails with StoreUnavailable when Redis is away or has not answered by the deadline (an answer that lies in
    the socket by then counts), and with RedisRefused on an error reply. A late reply is dropped when it comes.
    """

    def __init__(self, url: str, *, deadline: float) -> None:
        self._address = RedisAddress.parse(url)
        self._deadline = deadline
        self._loop: asyncio.AbstractEventLoop
        self._connection: RedisConnection | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._was_tried = asyncio.Event()
        self._was_lost = asyncio.Event()
        self._unsent: list[_Call] = []
        self._packed: list[bytes] = []
        self._sent: deque[_Call] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0
        self._misses = 0

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection, as far as is known."""
        return self._connection is not None

    async def connect(self) -> None:
        """Try once to connect, and from now on keep a connection up. Never raises because Redis is away."""
        self._loop = asyncio.get_running_loop()
        self._keeper = spawn(self._stay_connected(), name="redis lane")
        await self._was_tried.wait()

    async def close(self) -> None:
        """Close the connection; whatever is on its way fails."""
        if self._keeper is not None:
            self._keeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._keeper
        self._drop("Redis connection closed.")

    def send(self, on_reply: OnReply, *args: Argument, deadline: float | None = None) -> None:
        """Queue a command; it is written at the end of this tick, or by `flush`. The deadline starts then (s)."""
        if self._connection is None:
            on_reply(StoreUnavailable("Redis is away."))
            return
        if not self._unsent:
            self._loop.call_soon(self.flush)
        self._packed.append(pack_command(args))
        self._unsent.append(_Call(on_reply, self._deadline if deadline is None else deadline))

    def flush(self) -> None:
        """Write what is queued, in one write."""
        calls, self._unsent = self._unsent, []
        packed, self._packed = self._packed, []
        if not calls or self._connection is None:
            return
        now = self._loop.time()
        for call in calls:
            call.due += now
        self._sent.extend(calls)
        self._connection.write(b"".join(packed))
        self._watch(min(call.due for call in calls))

    async def call(self, *args: Argument, deadline: float | None = None) -> Any:
        """Send a command and wait for its reply; raises StoreError."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.send(lambda reply: settle(future, reply), *args, deadline=deadline)
        return await future

    def _take_reply(self, reply: Any) -> None:
        if not self._sent:
            self._drop("Redis sent a reply to nothing.")
            return
        self._misses = 0
        on_reply = self._sent.popleft().on_reply
        if on_reply is not None:
            on_reply(translate_reply(reply) if isinstance(reply, hiredis.ReplyError) else reply)
            # only a new connection finds the new primary after a failover
            if isinstance(reply, hiredis.ReplyError) and str(reply).startswith("READONLY"):
                self._drop("Redis became a replica.")

    def _watch(self, due: float) -> None:
        """One timer for all calls: it is set for the earliest deadline and looks for the next when it fires."""
        if self._timer is not None:
            if self._timer_due <= due:
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(due, self._expire)
        self._timer_due = due

    def _expire(self) -> None:
        self._timer = self._loop.call_later(GRACE_SECONDS, self._judge, self._loop.time())
        self._timer_due = 0.0

    def _judge(self, until: float) -> None:
        """Fail the calls that were due by then and have no reply still."""
        self._timer = None
        # timers count in the clock's resolution, so one may fire that much before its time
        overdue = [call for call in self._sent if call.due <= until + 1e-3 and call.on_reply is not None]
        for call in overdue:
            on_reply, call.on_reply = call.on_reply, None
            if on_reply is not None:
                on_reply(StoreUnavailable("Redis did not answer in time."))
        if overdue:
            self._misses += 1
        if self._misses >= MISSES_BEFORE_RECONNECT:
            self._drop("Redis stopped answering.")
            return
        waiting = [call.due for call in self._sent if call.on_reply is not None]
        if waiting:
            self._watch(min(waiting))

    async def _stay_connected(self) -> None:
        pause, was_away = LEAST_PAUSE, False
        while True:
            try:
                connection = await open_connection(self._address)
            except StoreError as error:
                if not was_away:
                    log.warning("redis cannot be reached", extra={"reason": error.message})
                was_away = True
            else:
                if was_away:
                    log.info("redis is back")
                pause, was_away = LEAST_PAUSE, False
                self._adopt(connection)
                await self._was_lost.wait()
            self._was_tried.set()
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311
            pause = min(pause * 2, LONGEST_PAUSE)

    def _adopt(self, connection: RedisConnection) -> None:
        self._was_lost.clear()
        self._misses = 0
        connection.on_reply = self._take_reply
        connection.on_lost = lambda: self._drop("Redis closed the connection.")
        self._connection = connection
        self._was_tried.set()

    def _drop(self, reason: str) -> None:
        """Leave the connection and fail all that is on its way."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        close_connection(connection)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        calls = [*self._sent, *self._unsent]
        self._sent.clear()
        self._unsent, self._packed = [], []
        self._was_lost.set()
        for call in calls:
            if call.on_reply is not None:
                call.on_reply(StoreUnavailable(reason))


def settle(future: "asyncio.Future[Any]", reply: Any) -> None:
    """Give a reply, or the error that stands for it, to whoever waits, unless it has gone."""
    if future.done():
        return
    if isinstance(reply, StoreError):
        future.set_exception(reply)
    else:
        future.set_result(reply)


class Script:
    """A Lua script, called by its digest; where Redis does not know it, or does not let us, by its text."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._sha = sha1(text.encode(), usedforsecurity=False).hexdigest()
        self._is_evalsha_forbidden = False

    def send(
        self,
        lane: RedisLane,
        on_reply: OnReply,
        keys: tuple[Argument, ...],
        args: tuple[Argument, ...],
        *,
        deadline: float | None = None,
    ) -> None:
        """Queue a call of the script."""

        def send_text() -> None:
            lane.send(on_reply, "EVAL", self._text, len(keys), *keys, *args, deadline=deadline)

        def take(reply: Any) -> None:
            if isinstance(reply, RedisRefused) and reply.code in {"NOSCRIPT", "NOPERM", "NOCOMMAND"}:
                self._is_evalsha_forbidden = reply.code != "NOSCRIPT"
                send_text()  # EVAL also caches the script, so SCRIPT LOAD need not be allowed
            else:
                on_reply(reply)

        if self._is_evalsha_forbidden:
            send_text()
        else:
            lane.send(take, "EVALSHA", self._sha, len(keys), *keys, *args, deadline=deadline)

    async def run(
        self, lane: RedisLane, keys: tuple[Argument, ...], args: tuple[Argument, ...], *, deadline: float | None = None
    ) -> Any:
        """Call the script and wait for its reply; raises StoreError."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.send(lane, lambda reply: settle(future, reply), keys, args, deadline=deadline)
        return await future
