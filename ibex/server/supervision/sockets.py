"""The listening sockets of a node: one per worker slot on one address, owned by the supervisor."""

import errno
import os
import socket
from pathlib import Path

from ibex.errors import OperatorError

BACKLOG = 4096
"""Connections that may wait to be accepted, a slot; the system's own bound (`somaxconn`) applies as well."""

_REASONS = {
    errno.EADDRINUSE: (
        "{place} is in use by another program.",
        "Stop that program, or choose another port: ibexctl serve --port N.",
    ),
    errno.EACCES: (
        "This user may not listen on {place}.",
        "Ports below 1024 are reserved; choose a higher one: ibexctl serve --port N.",
    ),
    errno.EADDRNOTAVAIL: ("This machine has no address {host}.", "Set IBEX_HOST to one of its addresses."),
}


def open_listening_sockets(host: str, port: int, count: int) -> list[socket.socket]:
    """Listen `count` times on one address; port 0 takes a free one, the same for all.

    The kernel spreads connections over the sockets, and each has a queue of its own. Raises OperatorError when the
    address cannot be had.
    """
    family, address = _resolve(host, port)
    sockets: list[socket.socket] = []
    try:
        # SO_REUSEPORT lets a second server of the same user share the port in silence; a socket without it cannot
        with _bind(family, address, is_shared=False) as probe:
            address = (address[0], probe.getsockname()[1], *address[2:])
        sockets += [_bind(family, address, is_shared=True) for _ in range(count)]
        for sock in sockets:
            sock.listen(BACKLOG)
    except OSError as error:
        for sock in sockets:
            sock.close()
        place = f"port {port} of {host}"
        message, hint = _REASONS.get(error.errno or 0, (f"Cannot listen on {{place}}: {error.strerror}.", None))
        message = message.format(place=place, host=host)
        raise OperatorError(message[0].upper() + message[1:], hint=hint) from error
    return sockets


def url_of(sock: socket.socket) -> str:
    """Where a client on this machine reaches a listening socket."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 (compared with, not listened on)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class SocketPath:
    """A Unix socket's address in a directory whose own path may be longer than the 107 bytes the kernel takes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._directory: int | None = None

    def __enter__(self) -> str:
        if len(os.fsencode(self._path)) < 100:
            return str(self._path)
        self._directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        return f"/proc/self/fd/{self._directory}/{self._path.name}"

    def __exit__(self, *_exc: object) -> None:
        if self._directory is not None:
            os.close(self._directory)


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int, *tuple[int, ...]]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror:
        raise OperatorError(f"The name {host} means no address.", hint="Set IBEX_HOST to an address.") from None
    family, _, _, _, address = found[0]
    return family, (str(address[0]), int(address[1]), *(int(part) for part in address[2:]))


def _bind(
    family: socket.AddressFamily, address: tuple[str, int, *tuple[int, ...]], *, is_shared: bool
) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setblocking(False)
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    return sock
