"""Listening sockets: shared by a node's workers, and by nobody else."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ibex.errors import OperatorError
from ibex.server.supervision.sockets import SocketPath, open_listening_sockets, url_of


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def opened(stack: ExitStack, port: int, count: int) -> list[socket.socket]:
    return [stack.enter_context(sock) for sock in open_listening_sockets("127.0.0.1", port, count)]


def test_every_slot_listens_on_the_same_free_port(stack: ExitStack) -> None:
    sockets = opened(stack, 0, 3)
    port = sockets[0].getsockname()[1]

    assert port > 0
    assert {sock.getsockname() for sock in sockets} == {("127.0.0.1", port)}
    assert url_of(sockets[0]) == f"http://127.0.0.1:{port}"


def test_a_second_server_cannot_share_the_port_in_silence(stack: ExitStack) -> None:
    port = opened(stack, 0, 2)[0].getsockname()[1]

    with pytest.raises(OperatorError, match=f"Port {port} of 127.0.0.1 is in use") as refused:
        opened(stack, port, 2)
    assert "--port" in (refused.value.hint or "")


def test_a_port_can_be_probed_without_listening(stack: ExitStack) -> None:
    port = opened(stack, 0, 1)[0].getsockname()[1]

    with pytest.raises(OperatorError, match="in use"):
        open_listening_sockets("127.0.0.1", port, 0)
    assert open_listening_sockets("127.0.0.1", 0, 0) == []


def test_a_port_can_be_had_again_at_once_after_connections(stack: ExitStack) -> None:
    with ExitStack() as first:
        listener = opened(first, 0, 1)[0]
        port = listener.getsockname()[1]
        client = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        listener.setblocking(True)
        served, _ = listener.accept()
        served.close()  # the server closes first, so its side is left in TIME_WAIT
        client.recv(1)

    opened(stack, port, 2)


@pytest.mark.parametrize(("host", "message"), [("192.0.2.1", "no address"), ("no-such-name.invalid", "no address")])
def test_a_host_that_is_not_here_is_explained(host: str, message: str) -> None:
    with pytest.raises(OperatorError, match=message):
        open_listening_sockets(host, 0, 1)


def test_a_unix_socket_may_lie_deeper_than_its_address_reaches(tmp_path: Path, stack: ExitStack) -> None:
    directory = tmp_path.joinpath(*["deep"] * 40)
    directory.mkdir(parents=True)
    path = directory / "a.sock"
    listener = stack.enter_context(socket.socket(socket.AF_UNIX))
    client = stack.enter_context(socket.socket(socket.AF_UNIX))

    with SocketPath(path) as address:
        listener.bind(address)
    listener.listen()
    with SocketPath(path) as address:
        client.connect(address)

    assert path.is_socket()
