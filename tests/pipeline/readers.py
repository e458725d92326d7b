"""The real readers of Postgres, whose answers a test can count and hold back."""

import asyncio
from collections.abc import Sequence

from ibex.domain.directives import Directive
from ibex.domain.identity import AgentId, Credential, OrgId, TokenId
from ibex.stores.postgres.changes import ChangeFeed, Changes
from ibex.stores.postgres.directives import DirectiveReader
from ibex.stores.postgres.identity import IdentityReader
from ibex.stores.postgres.pool import Postgres
from tests.waiting import eventually


class Turnstile:
    """Counts answers of Postgres and, while it is shut, holds them back: what was read then grows old."""

    def __init__(self) -> None:
        self.count = 0
        self._is_open = asyncio.Event()
        self._is_open.set()

    def shut(self) -> None:
        self._is_open.clear()

    def open(self) -> None:
        self._is_open.set()

    async def reached(self, count: int = 1) -> None:
        """Wait until so many answers have come."""
        await eventually(lambda: self.count >= count)

    async def pass_through(self) -> None:
        self.count += 1
        await self._is_open.wait()


class WatchedReader(IdentityReader):
    """Credentials."""

    def __init__(self, postgres: Postgres) -> None:
        super().__init__(postgres)
        self.reads, self.rereads = Turnstile(), Turnstile()

    async def find_credential(self, token_id: TokenId, agent_id: AgentId, *, timeout: float = 5) -> Credential | None:
        credential = await super().find_credential(token_id, agent_id, timeout=timeout)
        await self.reads.pass_through()
        return credential

    async def find_credentials(
        self, keys: Sequence[tuple[OrgId, TokenId, AgentId]], *, timeout: float = 5
    ) -> dict[tuple[TokenId, AgentId], Credential]:
        credentials = await super().find_credentials(keys, timeout=timeout)
        await self.rereads.pass_through()
        return credentials


class WatchedDirectiveReader(DirectiveReader):
    """Directives."""

    def __init__(self, postgres: Postgres) -> None:
        super().__init__(postgres)
        self.reads = Turnstile()

    async def in_force(self, org_id: OrgId, agent_id: AgentId, *, timeout: float = 5) -> Directive | None:
        directive = await super().in_force(org_id, agent_id, timeout=timeout)
        await self.reads.pass_through()
        return directive


class WatchedFeed(ChangeFeed):
    """The change feed."""

    def __init__(self, dsn: str, *, deadline: float = 1.0) -> None:
        super().__init__(dsn, deadline=deadline)
        self.questions = 0
        self.answers = Turnstile()

    async def poll(self) -> Changes:
        self.questions += 1
        changes = await super().poll()
        await self.answers.pass_through()
        return changes
