"""What the service manager that started this node hears of it, by systemd's protocol: ready, reloading, stopping."""

import contextlib
import socket
import time
from collections.abc import Iterator


class Notifier:
    """Tells the service manager how the node is; without one, or when it does not listen, nothing happens."""

    def __init__(self, address: str | None = None) -> None:
        """`address` is its datagram socket, as NOTIFY_SOCKET names it: a path, or `@` and an abstract name."""
        self._address = f"\0{address[1:]}" if address and address.startswith("@") else address
        self._status = ""
        self._is_stopping = False

    def ready(self, status: str) -> None:
        """The node serves; `status` is what `systemctl status` shows."""
        self._status = status
        self._say_ready()

    @contextlib.contextmanager
    def reloading(self) -> Iterator[None]:
        """A rolling restart is under way; however it ends, the node serves then."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")
        try:
            yield
        finally:
            if not self._is_stopping:
                self._say_ready()

    def stopping(self) -> None:
        """The node was told to stop."""
        self._is_stopping = True
        self._send("STOPPING=1", "STATUS=Stopping")

    def _say_ready(self) -> None:
        self._send("READY=1", f"STATUS={self._status}")

    def _send(self, *assignments: str) -> None:
        if self._address is None:
            return
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
        ):
            sock.setblocking(False)
            sock.sendto("\n".join(assignments).encode(), self._address)
