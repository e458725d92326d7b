"""An organization's erasure: from both stores, Redis and this node's journal, in steps that can be taken again."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from ibex.domain.identity import OrgId
from ibex.domain.turns import decode_turn
from ibex.errors import StoreError
from ibex.recorder.ledger import DATABASE_NAME, Ledger
from ibex.stores.clickhouse.erasure import TraceErasure
from ibex.stores.postgres.erasure import OrganizationEraser

log = logging.getLogger("ibex.recorder")

_FORGET_SECONDS = 600.0
_PAGE_PAUSE_SECONDS = 0.005


@dataclass(frozen=True, slots=True)
class Erasure:
    """What was deleted; of an erasure that was begun before, what was left."""

    checkpoints: int
    sessions: int
    traces: int
    redis_keys: int
    dead_letters: int
    """Those in this node's journal; other nodes delete theirs within minutes."""


async def erase_organization(
    org_id: OrgId,
    *,
    organizations: OrganizationEraser,
    traces: TraceErasure,
    delete_keys: Callable[[OrgId], Awaitable[int]],
    tell: Callable[[], Awaitable[object]],
    journal_dir: Path,
) -> Erasure:
    """Erase an organization. `tell` passes on to running servers that its tokens are refused.

    The organization's own row goes last, so that an erasure that was cut short can be begun again by its id. One that
    was erased before is erased again from where a backup or a lost table may have brought it back: ClickHouse, Redis
    and the journal. Raises UnknownEntity, or StoreError when it must be run again.
    """
    is_there = await organizations.begin(org_id)
    await tell()
    await traces.note(org_id)  # from here on both deliveries drop what still comes
    records = await organizations.delete_records(org_id)
    late = await organizations.delete_tenancy(org_id)
    erased_traces = await traces.delete_all(org_id)
    redis_keys = await delete_keys(org_id)
    dead_letters = await _drop_dead_letters_of(journal_dir, org_id)
    if is_there:
        await organizations.finish(org_id)
    return Erasure(
        checkpoints=records.checkpoints + late.checkpoints,
        sessions=records.sessions + late.sessions,
        traces=erased_traces,
        redis_keys=redis_keys,
        dead_letters=dead_letters,
    )


async def forget_erased(ledger: Ledger, traces: TraceErasure, stop: asyncio.Event) -> None:
    """Every ten minutes until `stop`: drop the dead letters of organizations that were erased."""
    while not stop.is_set():
        try:
            await _learn_organizations(ledger)
            erased = await traces.find(ledger.dead_letter_organizations())
            dropped = sum([await _drop_dead_letters(ledger, org_id) for org_id in erased])
            if dropped:
                log.warning("dead letters of erased organizations dropped", extra={"turns": dropped})
        except StoreError as error:
            log.warning("dead letters not looked through", extra={"reason": error.message})
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), _FORGET_SECONDS)


async def _drop_dead_letters_of(journal_dir: Path, org_id: OrgId) -> int:
    if not (journal_dir / DATABASE_NAME).exists():
        return 0
    with closing(Ledger(journal_dir)) as ledger:
        await _learn_organizations(ledger)
        return await _drop_dead_letters(ledger, org_id)


async def _learn_organizations(ledger: Ledger) -> None:
    """Of dead letters that an earlier version put aside, or that are no turns: whose they are. A page at a time, since
    this is the loop that delivers.
    """
    while ledger.learn_organizations(_read_organization):  # noqa: ASYNC110 - a pause between two pages
        await asyncio.sleep(_PAGE_PAUSE_SECONDS)


async def _drop_dead_letters(ledger: Ledger, org_id: OrgId) -> int:
    dropped = 0
    while count := ledger.drop_dead_letters(org_id):
        dropped += count
        await asyncio.sleep(_PAGE_PAUSE_SECONDS)
    return dropped


def _read_organization(payload: bytes) -> UUID | None:
    """Whose turn it is; None when it is no turn, and nobody can say."""
    try:
        return decode_turn(payload).org_id
    except ValueError:
        return None
