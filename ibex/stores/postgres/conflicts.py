"""What Postgres rolled back because two transactions stood in each other's way is done again, a few times."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import asyncpg

from ibex.errors import StoreUnavailable

T = TypeVar("T")

_CONFLICTS = (asyncpg.DeadlockDetectedError, asyncpg.SerializationError)


async def despite_conflicts(act: Callable[[], Awaitable[T]], *, attempts: int = 4) -> T:
    """What `act` answers, a whole transaction that leaves nothing behind when it fails.

    Raises StoreUnavailable for the last of `attempts` conflicts, and whatever else `act` raises at once.
    """
    for attempt in range(1, attempts):
        try:
            return await act()
        except StoreUnavailable as error:
            if not isinstance(error.__cause__, _CONFLICTS):
                raise
        await asyncio.sleep(random.uniform(0.01, 0.05) * attempt)  # noqa: S311 - jitter
    return await act()
