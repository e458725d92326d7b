"""Connections pass from a worker to its successor while they are idle, so that a rolling restart closes none."""

import asyncio
import fcntl
import logging
import socket
import struct
import sys
import termios
from collections.abc import Callable

from ibex.server.protocol import EdgeProtocol

log = logging.getLogger("ibex.server")

_UNREAD = struct.Struct("i")


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

    def give(self, connection: EdgeProtocol) -> bool:
        """Hand an idle connection over; False when it is not idle just now, or the pair is full for a moment.

        The kernel keeps what the client sends meanwhile, so the successor reads it; closing this process's own
        descriptor says nothing to the client.
        """
        transport = connection.transport
        if transport is None or transport.is_closing() or not is_at_rest(connection):
            return False
        fd = transport.get_extra_info("socket").fileno()
        try:
            socket.send_fds(self._giving, [b"c"], [fd])
        except OSError:
            return False
        connection.force_close()
        return True

    def close(self) -> None:
        """Close both ends."""
        self.stop_taking()
        self._giving.close()
        self._taking.close()

    def _receive(self, on_connection: Callable[[socket.socket], None]) -> None:
        try:
            _, fds, _, _ = socket.recv_fds(self._taking, 1, 1)
        except BlockingIOError:
            return
        except OSError as error:
            log.error("a connection could not be taken over", extra={"reason": error.strerror})
            return
        for fd in fds:
            on_connection(socket.socket(fileno=fd))


def is_at_rest(connection: EdgeProtocol) -> bool:
    """Whether nothing of a connection is in this process: no request, not the beginning of one, no unsent answer."""
    transport = connection.transport
    return (
        connection.is_idle
        and connection._waiter is not None  # aiohttp's own state: it waits for a request, and has none queued
        and not connection._messages
        and not connection._is_deaf
        and transport is not None
        and not transport.get_write_buffer_size()
    )


def has_unread(connection: EdgeProtocol) -> bool:
    """Whether the client has sent something that the event loop has not seen yet."""
    transport = connection.transport
    if transport is None or transport.is_closing():
        return False
    fd = transport.get_extra_info("socket").fileno()
    try:
        answer = fcntl.ioctl(fd, termios.FIONREAD, _UNREAD.pack(0))
    except OSError:
        return False
    return int.from_bytes(answer, sys.byteorder) > 0
