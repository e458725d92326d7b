"""Waiting in tests for what happens elsewhere."""

import asyncio
from collections.abc import Callable


async def eventually(condition: Callable[[], object], *, within: float = 20.0) -> None:
    """Return when the condition holds; fail when it never does. `within` is patience, not an expectation."""
    async with asyncio.timeout(within):
        while not condition():  # noqa: ASYNC110 - there is nothing that could be awaited
            await asyncio.sleep(0.01)
