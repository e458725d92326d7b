"""The proof, before a node announces itself, that it serves nobody who presents no token."""

import asyncio
from urllib.parse import urlsplit

from ibex.errors import OperatorError

_REQUEST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: ibex\r\nContent-Type: application/json\r\n"
    b"Content-Length: 2\r\nConnection: close\r\n\r\n{}"
)
_REFUSED = b"HTTP/1.1 401 "
_ANSWER_SECONDS = 10.0


async def prove_token_is_demanded(url: str, *, times: int) -> None:
    """Ask for a completion without a token, over so many connections to the address where clients connect.

    Raises OperatorError unless each is refused with 401.
    """
    where = urlsplit(url)
    for _ in range(times):
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                status_line = await _ask(where.hostname or "", where.port or 80)
        except (OSError, TimeoutError, ValueError) as error:
            raise OperatorError(
                f"The server does not answer at its own address {url} ({type(error).__name__}).",
                hint="The log says what its workers are doing.",
            ) from error
        if not status_line.startswith(_REFUSED):
            answered = status_line[: len(_REFUSED) - 1].decode("ascii", "replace").strip()
            raise OperatorError(
                f"A request without a token was answered with “{answered}” and not with 401, so nothing is served.",
                hint="Another program may answer at this address; if it is ibex, please report it.",
            )


async def _ask(host: str, port: int) -> bytes:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(_REQUEST)
        return await reader.readline()
    finally:
        writer.transport.abort()
