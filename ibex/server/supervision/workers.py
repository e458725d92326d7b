"""The workers of a node: a slot and a listening socket each; a neighbour serves the socket of one that is away."""

import asyncio
import itertools
import socket
from collections.abc import Awaitable, Callable, Sequence

from ibex.server.handover import Handover
from ibex.server.messages import Adopt, AnyMessage, Release, Share, Withdraw
from ibex.server.shares import ShareBook
from ibex.server.supervision.children import Child
from ibex.server.supervision.keeping import Keeper


class WorkerPool:
    """Starts, keeps, replaces and drains the workers, and passes on what they share.

    `launch` starts a process for a slot, which inherits all listening sockets and the slot's own pair for handing
    connections over; the pool must hear its messages (`hear`) and its end (`forget`).
    """

    def __init__(
        self, count: int, launch: Callable[[int, Sequence[socket.socket], Sequence[socket.socket]], Awaitable[Child]]
    ) -> None:
        self._launch = launch
        self._sockets: Sequence[socket.socket] = ()
        self._handovers: Sequence[Sequence[socket.socket]] = ()
        self._living: set[Child] = set()
        self._serving: set[int] = set()
        self._adopters: dict[int, int] = {}
        """Slots whose own worker is away, and the slot of the worker that accepts there."""
        self._shares = ShareBook()
        self._is_withdrawn = False
        self._is_stopping = False
        self.keepers = [self._keeper(slot) for slot in range(count)]

    async def start(self, sockets: Sequence[socket.socket]) -> None:
        """Start all side by side and wait until all serve; raises OperatorError when one does not.

        The pool owns the sockets, one a slot, from now on.
        """
        self._sockets = sockets
        self._handovers = [Handover.pair() for _ in sockets]
        starts = await asyncio.gather(*(keeper.start() for keeper in self.keepers), return_exceptions=True)
        for error in starts:
            if error is not None:
                raise error

    def withdraw(self) -> None:
        """Have all say at /ready that they are about to leave, and serve on."""
        self._is_withdrawn = True
        for slot in self._serving:
            self._tell(slot, Withdraw())

    async def stop(self, drain_seconds: float) -> None:
        """Drain all side by side."""
        self._is_stopping = True
        for keeper in self.keepers:
            await keeper.stop_watching()
        for sock in (*self._sockets, *itertools.chain(*self._handovers)):
            sock.close()
        await asyncio.gather(*(keeper.stop(drain_seconds) for keeper in self.keepers))

    def hear(self, child: Child, message: AnyMessage) -> None:
        """Keep what a worker shares, and pass it on to the others."""
        if isinstance(message, Share):
            self._shares.keep(message)
            for other in self._living:
                if other is not child:
                    other.offer(message)

    def forget(self, child: Child) -> None:
        """A worker has ended."""
        self._living.discard(child)

    def _keeper(self, slot: int) -> Keeper:
        async def launch() -> Child:
            child = await self._launch(slot, self._sockets, self._handovers[slot])
            self._living.add(child)
            for share in self._shares:
                child.offer(share)
            return child

        return Keeper(
            f"worker {slot}", launch, on_up=lambda: self._note_up(slot), on_down=lambda: self._note_down(slot)
        )

    def _note_up(self, slot: int) -> None:
        self._serving.add(slot)
        if self._is_withdrawn:
            self._tell(slot, Withdraw())
        for adopted, adopter in self._adopters.items():
            if adopter == slot:  # its predecessor's duties, when this one replaces it
                self._tell(slot, Adopt(adopted))
        self._balance()

    def _note_down(self, slot: int) -> None:
        self._serving.discard(slot)
        self._balance()

    def _balance(self) -> None:
        """Every socket is to be served: by its own worker, else by the next one that lives."""
        if self._is_stopping:
            return
        count = len(self.keepers)
        for slot in range(count):
            adopter = self._adopters.get(slot)
            if slot in self._serving:
                if adopter is not None:
                    del self._adopters[slot]
                    self._tell(adopter, Release(slot))
            elif adopter not in self._serving:
                self._adopters.pop(slot, None)
                neighbours = ((slot + step) % count for step in range(1, count))
                chosen = next((neighbour for neighbour in neighbours if neighbour in self._serving), None)
                if chosen is not None:
                    self._adopters[slot] = chosen
                    self._tell(chosen, Adopt(slot))

    def _tell(self, slot: int, message: Adopt | Release | Withdraw) -> None:
        child = self.keepers[slot].child
        if child is not None:
            child.send(message)
