"""A client that sends bytes as they are, in whatever pieces, and reads what comes back without helping anybody."""

import asyncio
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Self

PATIENCE = 10.0
"""Seconds after which a connection that says nothing hangs."""
PROBE = b"GET /health?probe HTTP/1.1\r\nHost: ibex\r\n\r\n"


@dataclass(frozen=True)
class Response:
    """One response."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass
class Connection:
    """One connection; `received` is every byte that came back."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    received: bytearray = field(default_factory=bytearray)
    is_ended: bool = False

    @classmethod
    async def open(cls, port: int) -> Self:
        """Connect to a port of this machine."""
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def send(self, pieces: Iterator[bytes | float]) -> None:
        """Send pieces one after the other, pausing at each number (s). What comes back may end it at any moment."""
        for piece in pieces:
            if self.is_ended:
                return
            if isinstance(piece, float):
                await asyncio.sleep(piece)
                continue
            self.writer.write(piece)
            try:
                await self.writer.drain()
            except ConnectionError:
                return
            await asyncio.sleep(0)

    async def read_on(self) -> bool:
        """Read some more; False at the end."""
        try:
            data = await self.reader.read(1 << 16)
        except ConnectionError:
            data = b""
        self.received += data
        self.is_ended = not data
        return bool(data)

    def close(self) -> None:
        """Go without a word."""
        self.writer.transport.abort()


def responses(received: bytes, *, is_head: bool = False) -> list[Response]:
    """The whole responses in what came back; what is left over must be the beginning of another."""
    found = []
    rest = received
    while b"\r\n\r\n" in rest:
        head, _, rest_after_head = rest.partition(b"\r\n\r\n")
        line, *lines = head.decode("latin-1").split("\r\n")
        assert line.startswith("HTTP/1.1 "), line
        headers = {name.lower(): value.strip() for name, _, value in (text.partition(":") for text in lines)}
        assert len(headers) == len(lines), "a header was given twice"
        status = int(line.split(" ")[1])
        length = 0 if is_head or status < 200 else int(headers["content-length"])
        if len(rest_after_head) < length:
            break
        found.append(Response(status, headers, rest_after_head[:length]))
        rest = rest_after_head[length:]
    return found


async def converse(port: int, pieces: Iterator[bytes | float], answers: frozenset[str], *, is_head: bool) -> str:
    """Send, read until the connection is closed or as many answers have come as may come; the transcript.

    A connection that seems open is asked once more, so that one that only hangs is not taken for open.
    """
    connection = await Connection.open(port)
    most = max(sum(status.isdigit() and status != "100" for status in answer.split()) for answer in answers)
    try:
        async with asyncio.timeout(PATIENCE):
            sending = asyncio.ensure_future(connection.send(pieces))
            try:
                await _read_until(connection, most, sending, is_head=is_head)
            finally:
                sending.cancel()
            seen = responses(bytes(connection.received), is_head=is_head)
            before = len(connection.received)
            if not connection.is_ended:
                connection.writer.write(PROBE)
                await _read_until(connection, 1, None, offset=before)
    except TimeoutError:
        return f"{_statuses(responses(bytes(connection.received), is_head=is_head))}hangs"
    finally:
        connection.close()
    for response in seen:
        check_response(response, is_head=is_head)
    if connection.is_ended:
        return f"{_statuses(seen)}closed"
    probed = responses(bytes(connection.received[before:]))
    return f"{_statuses(seen)}open" if [answer.status for answer in probed] == [200] else f"{_statuses(seen)}confused"


async def _read_until(
    connection: Connection,
    count: int,
    sending: "asyncio.Future[None] | None",
    *,
    offset: int = 0,
    is_head: bool = False,
) -> None:
    """Read until so many final responses have come and all has been sent, or the end."""
    while not connection.is_ended:
        seen = responses(bytes(connection.received[offset:]), is_head=is_head)
        if len([response for response in seen if response.status >= 200]) < count:
            await connection.read_on()
            continue
        is_sent = sending is None or sending.done()
        try:  # whoever answers and then closes has its end on the way
            async with asyncio.timeout(0.03):
                await connection.read_on()
        except TimeoutError:
            if is_sent:
                return


def check_response(response: Response, *, is_head: bool) -> None:
    """What holds for every response."""
    assert response.status < 500, response.status
    if response.status >= 400:
        assert response.headers["content-type"] == "application/json"
        if not is_head:
            error = json.loads(response.body)["error"]
            assert error["request_id"] == response.headers["x-request-id"]
            assert set(error) >= {"message", "type", "code", "param", "timestamp"}


def _statuses(seen: list[Response]) -> str:
    return "".join(f"{response.status} " for response in seen)


def in_one(data: bytes) -> Iterator[bytes | float]:
    """All at once."""
    yield data


def byte_by_byte(data: bytes) -> Iterator[bytes | float]:
    """A byte at a time; of what is long only the first and last, and the middle in a dozen pieces."""
    if len(data) <= 1200:
        yield from (data[index : index + 1] for index in range(len(data)))
        return
    yield from byte_by_byte(data[:400])
    yield from at_random(data[400:-200])
    yield from byte_by_byte(data[-200:])


def at_random(data: bytes) -> Iterator[bytes | float]:
    """In a dozen pieces, cut anywhere."""
    cuts = sorted(random.sample(range(len(data)), min(12, len(data))))
    yield from (data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True) if start != end)


def with_a_pause(data: bytes) -> Iterator[bytes | float]:
    """The head, a moment, and the rest."""
    head, separator, rest = data.partition(b"\r\n\r\n")
    yield head + separator
    yield 0.02
    if rest:
        yield rest
