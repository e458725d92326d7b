"""Connections pass from a worker to its successor while they are idle, so that a rolling restart closes none."""

import asyncio
import logging
import socket
from collections.abc import Callable

log = logging.getLogger("ibex.server")


class Handover:
    """One slot's pair of sockets, inherited by all its workers: the draining one puts connections in, the other takes
    them out. What a worker that dies has not taken, the next one does.
    """

    def __init__(self, giving: socket.socket, taking: socket.socket) -> None:
        """Owns both ends of a pair of SOCK_SEQPACKET."""
        self._giving, self._taking = giving, taking
        for end in (giving, taking):
            end.setblocking(False)
        self._is_taking = False

    @staticmethod
    def pair() -> tuple[socket.socket, socket.socket]:
        """A new pair: one message a connection, so that none is torn from its descriptor."""
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def take(self, on_connection: Callable[[socket.socket], None]) -> None:
        """Call this with each connection that a predecessor hands over, until `stop_taking`."""
        asyncio.get_running_loop().add_reader(self._taking, self._receive, on_connection)
        self._is_taking = True

    def stop_taking(self) -> None:
        """Leave what comes to a successor."""
        if self._is_taking:
            self._is_taking = False
            asyncio.get_running_loop().remove_reader(self._taking)

    def give(self, fd: int) -> bool:
        """Hand the connection of this descriptor over; False when the pair is full for a moment.

        The kernel keeps what the client sends meanwhile, so the successor reads it; closing this process's own
        descriptor says nothing to the client.
        """
        try:
            socket.send_fds(self._giving, [b"c"], [fd])
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Close both ends."""
        self.stop_taking()
        self._giving.close()
        self._taking.close()

    def _receive(self, on_connection: Callable[[socket.socket], None]) -> None:
        try:
            word, fds, _, _ = socket.recv_fds(self._taking, 1, 1)
        except BlockingIOError:
            return
        except OSError as error:
            log.error("a connection could not be taken over", extra={"reason": error.strerror})
            return
        if word and not fds:  # this process has no descriptor left, so the kernel has closed the connection
            log.error("a connection was lost on its way here", extra={"reason": "too many open files"})
        for fd in fds:
            on_connection(socket.socket(fileno=fd))
