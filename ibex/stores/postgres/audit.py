"""The frame of every operator's change: one transaction with its audit event, and the changes it will be known by."""

import json
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import asyncpg

from ibex.errors import StoreRefused
from ibex.stores.postgres.changes import Change
from ibex.stores.postgres.pool import Connection, Postgres

Row = dict[str, Any]
"""A row under the contract's column names; digests are hex."""


class AuditedStore:
    """What operators change things through, as the owner."""

    def __init__(self, postgres: Postgres, *, actor: str = "operator") -> None:
        self._postgres = postgres
        self._actor = actor
        self.changes: list[Change] = []
        """What has been committed through this object, for the caller to publish."""

    @asynccontextmanager
    async def _changing(self) -> AsyncIterator[Connection]:
        """A transaction; what the triggers noted in it is added to `changes` once it has committed."""
        async with self._postgres.transaction(timeout=15, operation="operator") as connection:
            yield connection
            rows = await connection.fetch(_OWN_CHANGES)
        self.changes.extend(Change(row["kind"], row["entity_id"]) for row in rows)

    async def _audit(
        self, connection: Connection, action: str, kind: str, entity_id: UUID, org_id: UUID, **details: object
    ) -> None:
        """Note what the operator did, in the transaction of the deed.

        Details never hold a secret or a text of a prompt.
        """
        await self._note(connection, self._actor, action, kind, entity_id, org_id, details)

    async def _note(
        self,
        connection: Connection,
        actor: str,
        action: str,
        kind: str,
        entity_id: UUID,
        org_id: UUID,
        details: Mapping[str, object],
    ) -> None:
        """The same of somebody else, such as a token (by its prefix)."""
        await connection.execute(
            "insert into ibex_core.audit_events (org_id, actor, action, entity_kind, entity_id, details)"
            " values ($1, $2, $3, $4, $5, $6::jsonb)",
            *(org_id, actor, action, kind, entity_id, json.dumps(details, default=str)),
        )


async def write(connection: Connection, statement: str, *values: object) -> Row:
    """Run a statement that returns the one row it wrote."""
    row = await connection.fetchrow(statement, *values)
    if row is None:
        raise StoreRefused("Postgres wrote no row.")
    return plain(row)


def plain(row: asyncpg.Record, *, text: Collection[str] = ()) -> Row:
    """A record as a dict, without a token's digest, which leaves the store for nobody.

    Bytes become hex, or text (as far as they are UTF-8) in the columns named by `text`.
    """
    return {name: _plain(value, is_text=name in text) for name, value in row.items() if name != "digest"}


def _plain(value: Any, *, is_text: bool) -> Any:
    if not isinstance(value, bytes):
        return value
    return value.decode(errors="replace") if is_text else value.hex()


_OWN_CHANGES = """
select kind, entity_id from ibex_core.changes where xid = pg_current_xact_id_if_assigned() order by change_id
"""
