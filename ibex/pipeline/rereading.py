"""Reading again, in the background and in batches, what a worker remembers of its callers."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from itertools import islice
from typing import NoReturn
from uuid import UUID

from ibex.errors import StoreError
from ibex.pipeline.changes import ChangeFollower, now
from ibex.pipeline.principals import Entry, Key, PrincipalCache, ids_of, is_valid, make_entry
from ibex.stores.postgres.identity import IdentityReader

log = logging.getLogger("ibex.authentication")

PAUSE_SECONDS = 2.0
BATCH = 100
"""Credentials a question: more would hold the event loop up for milliseconds while they are decoded."""
TELL_SECONDS = 60.0
"""How often the neighbours, their successors and the database hear that a token is in use."""


class Rereader:
    """Keeps entries in use less than 30 s old; while Postgres is away they stay as they are."""

    def __init__(
        self,
        reader: IdentityReader,
        follower: ChangeFollower,
        cache: PrincipalCache,
        tell: Callable[[Entry], None],
    ) -> None:
        self._reader = reader
        self._follower = follower
        self._cache = cache
        self._tell = tell
        self._is_failing = False
        self._is_hurried = asyncio.Event()
        follower.listen(self._hear)

    async def run(self) -> NoReturn:
        """Read again what is due every other second, and at once when it is hurried, for ever."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PAUSE_SECONDS):
                    await self._is_hurried.wait()
            self._is_hurried.clear()
            try:
                await self.reread_due()
            except StoreError as error:
                if not self._is_failing:
                    log.warning("remembered callers could not be read again", extra={"reason": error.message})
                self._is_failing = True
            else:
                self._is_failing = False

    async def reread_due(self) -> None:
        """Read again what is due, unless Postgres is not heard. Raises StoreError."""
        if not self._follower.is_current(now()):
            return
        due = self._cache.due_for_reread(now())
        while batch := list(islice(due, BATCH)):
            await self._reread(batch)
            await self._tell_of_use([key for key, _ in batch])

    async def _reread(self, batch: list[tuple[Key, Entry]]) -> None:
        began = now()
        credentials = [entry.credential for _, entry in batch]
        found = await self._reader.find_credentials([(one.org_id, one.token_id, one.agent_id) for one in credentials])
        for key, entry in batch:
            former = entry.credential
            credential = found.get((former.token_id, former.agent_id))
            is_outdated = self._follower.changed_since(began, ids_of(credential or former))
            if is_outdated or self._cache.peek(key) is not entry:
                continue
            if credential is None or credential.agent_status is None or not is_valid(credential, key[0]):
                self._cache.drop(key)
            else:
                renewed = make_entry(credential, began, entry.used_at)
                renewed.told_at = entry.told_at
                self._cache.put(key, renewed)

    def hurry(self) -> None:
        """Read again soon: whoever is void when Postgres goes away is refused for as long as it is away."""
        self._is_hurried.set()

    def _hear(self, kind: str, _: UUID | None) -> None:
        if kind == "reset":
            self.hurry()

    async def _tell_of_use(self, keys: list[Key]) -> None:
        moment = now()
        used = []
        for key in keys:
            entry = self._cache.peek(key)
            if entry is not None and entry.used_at > entry.told_at and moment - entry.told_at > TELL_SECONDS:
                entry.told_at = moment
                self._tell(entry)
                used.append((entry.credential.org_id, entry.credential.token_id))
        await self._reader.mark_used(used)
