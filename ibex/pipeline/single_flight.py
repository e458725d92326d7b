"""One read for everybody who wants the same thing at the same moment."""

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from functools import partial
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class SingleFlight(Generic[K, V]):
    """Reads under way, by key: who asks meanwhile waits for the same one, and who hangs up stops it for nobody."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._flights: dict[K, asyncio.Task[V]] = {}

    async def run(self, key: K, read: Callable[[], Coroutine[Any, Any, V]]) -> V:
        """The result of the read under way for `key`, else of a new one; raises what it raises."""
        flight = self._flights.get(key)
        # One that is over may stand here until its callback runs: what it read may have changed since.
        if flight is None or flight.done():
            flight = self._flights[key] = asyncio.get_running_loop().create_task(read(), name=self._name)
            flight.add_done_callback(partial(self._land, key))
        return await asyncio.shield(flight)

    async def close(self) -> None:
        """Give up every read under way."""
        flights = list(self._flights.values())
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)

    def _land(self, key: K, flight: asyncio.Task[V]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
        if not flight.cancelled():
            flight.exception()  # seen, even if everybody who waited has left: asyncio would report it as lost
