"""Changes as Redis tells them: the subscription of a process, and the publishing of what was committed."""

import asyncio
import json
import logging
import random
import time
from collections.abc import Callable, Iterable
from typing import Any, NoReturn
from uuid import UUID

import hiredis
import redis
import redis.asyncio

from ibex.domain.identity import parse_uuid
from ibex.errors import StoreError, StoreUnavailable
from ibex.stores.redis.connection import (
    RedisAddress,
    RedisConnection,
    close_connection,
    open_connection,
    pack_command,
    translate_reply,
)

log = logging.getLogger("ibex.changes")

CHANGES_CHANNEL = "ibex:changes"

PING_SECONDS = 1.0
PONG_SECONDS = 2.0
"""A PING without an answer for this long: the connection is broken."""
PUBLISH_SECONDS = 1.0
LEAST_PAUSE, LONGEST_PAUSE = 0.05, 1.0
"""Seconds between two attempts to connect."""


def boot_time() -> float:
    """Seconds since the machine started, its sleep included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class ChangeSubscription:
    """A connection of its own on the channel of changes. What it hears is early news; Postgres' feed is the truth.

    `on_change` gets each change's kind and the id of what changed, in the order of publishing.
    """

    def __init__(self, url: str, on_change: Callable[[str, UUID], None]) -> None:
        self._address = RedisAddress.parse(url)
        self._on_change = on_change
        self._events: asyncio.Queue[str] = asyncio.Queue()
        self.unbroken_since: float | None = None
        """When Redis confirmed the subscription (boot clock, s); None while there is none."""
        self.last_pong_sent_at: float | None = None
        """When the last answered PING of this connection was sent (boot clock, s); None before the first."""

    async def run(self) -> NoReturn:
        """Listen for ever, connecting again whenever the connection breaks."""
        pause, was_away = LEAST_PAUSE, False
        while True:
            try:
                await self._listen()
            except StoreError as error:
                if self.unbroken_since is not None:
                    pause, was_away = LEAST_PAUSE, False
                if not was_away:
                    log.warning("change subscription broken", extra={"reason": error.message})
                was_away = True
            finally:
                self.unbroken_since = self.last_pong_sent_at = None
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311
            pause = min(pause * 2, LONGEST_PAUSE)

    async def _listen(self) -> NoReturn:
        """One connection, to its end."""
        connection = await open_connection(self._address)
        events = self._events = asyncio.Queue()
        connection.on_reply = self._take
        connection.on_lost = lambda: events.put_nowait("lost")
        try:
            connection.write(pack_command(("SUBSCRIBE", CHANGES_CHANNEL)))
            await self._expect("subscribe")
            self.unbroken_since = boot_time()
            log.info("change subscription open")
            while True:
                await self._ping(connection)
                await self._rest()
        finally:
            close_connection(connection)

    async def _ping(self, connection: RedisConnection) -> None:
        sent_at = boot_time()
        connection.write(pack_command(("PING",)))
        await self._expect("pong")
        self.last_pong_sent_at = sent_at

    async def _expect(self, event: str) -> None:
        try:
            async with asyncio.timeout(PONG_SECONDS):
                came = await self._events.get()
        except TimeoutError:
            raise StoreUnavailable("Redis did not answer in time.") from None
        if came != event:
            raise StoreUnavailable("Redis closed the connection.")

    async def _rest(self) -> None:
        """Until the next PING is due; at once when the connection is lost."""
        try:
            async with asyncio.timeout(PING_SECONDS):
                await self._events.get()
        except TimeoutError:
            return
        raise StoreUnavailable("Redis closed the connection.")

    def _take(self, reply: Any) -> None:
        match reply:
            case [b"message", _, bytes(payload)]:
                self._hear(payload)
            case [b"subscribe", *_]:
                self._events.put_nowait("subscribe")
            case [b"pong", *_]:
                self._events.put_nowait("pong")
            case _:
                error = translate_reply(reply).message if isinstance(reply, hiredis.ReplyError) else "unexpected reply"
                log.warning("change subscription refused", extra={"reason": error})
                self._events.put_nowait("lost")

    def _hear(self, payload: bytes) -> None:
        try:
            message = json.loads(payload)
            kind, entity_id = message["kind"], parse_uuid(message["entity_id"])
        except (ValueError, TypeError, KeyError, RecursionError):
            kind, entity_id = None, None
        if not isinstance(kind, str) or entity_id is None:
            # anybody with access to Redis can publish here, so what it said is not repeated
            log.warning("change message ignored", extra={"bytes": len(payload)})
            return
        self._on_change(kind, entity_id)


async def publish_changes(url: str, changes: Iterable[tuple[str, UUID]]) -> bool:
    """Publish (kind, entity id) of what was committed, within a second; False when Redis did not take it.

    That is no error of whoever committed: every process reads the same changes from Postgres a moment later.
    """
    messages = [json.dumps({"kind": kind, "entity_id": str(entity_id)}) for kind, entity_id in changes]
    if not messages:
        return True
    try:
        async with asyncio.timeout(PUBLISH_SECONDS), redis.asyncio.from_url(url) as client:
            for message in messages:
                await client.publish(CHANGES_CHANNEL, message)
    except (redis.RedisError, OSError, TimeoutError):
        return False
    return True
