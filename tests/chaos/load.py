"""A steady mixed load, and the one honest witness of what came of it: a client that counts what it saw."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from uuid import UUID, uuid4

import aiohttp

DONE = b"data: [DONE]\n\n"


class Kind(StrEnum):
    """What a request asks for."""

    JSON = "json"
    STREAM = "stream"
    HANG_UP_EARLY = "hang_up_early"
    """The client leaves before the first byte."""
    HANG_UP_LATE = "hang_up_late"
    """The client leaves in mid-stream."""
    CUT = "cut"
    """The provider breaks the stream off."""
    REFUSED = "refused"
    """The provider refuses."""


class End(StrEnum):
    """What the client saw in the end."""

    WHOLE = "whole"
    CUT = "cut"
    LEFT = "left"
    REFUSED = "refused"
    BROKEN = "broken"
    """The connection failed: the server, or its worker, died."""


@dataclass(slots=True)
class Sight:
    """One request, as its client saw it."""

    kind: Kind
    session: str
    request_id: UUID = field(default_factory=uuid4)
    end: End = End.BROKEN
    turn_id: UUID | None = None
    usage: tuple[int, int] | None = None
    """Input and output tokens, where the reply said them."""
    why: str = ""
    """The code of the error, after the status where there was one; or how the connection failed."""


KINDS: dict[Kind, int] = {
    Kind.JSON: 45, Kind.STREAM: 35, Kind.HANG_UP_LATE: 7, Kind.HANG_UP_EARLY: 4, Kind.CUT: 5, Kind.REFUSED: 4
}  # fmt: skip


class Load:
    """So many clients at once, each asking on and on; `url` is read anew for each request."""

    def __init__(
        self,
        url: Callable[[], str],
        headers: Mapping[str, str],
        *,
        clients: int = 24,
        kinds: Mapping[Kind, int] = KINDS,
        is_fresh: bool = False,
        sessions: int | None = None,
        pause: float = 0.0,
    ) -> None:
        """`is_fresh`: every request has a connection of its own. `sessions`: so many, which the clients share with
        those of every other load that says so; else each client has its own. `pause`: seconds between two requests.
        """
        self.sights: list[Sight] = []
        self._url = url
        self._headers = dict(headers)
        self._clients = clients
        self._is_fresh = is_fresh
        self._sessions = sessions
        self._pause = pause
        self._kinds, self._weights = list(kinds), list(kinds.values())
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Ask until `stop`."""
        patience = aiohttp.ClientTimeout(total=40)
        connector = aiohttp.TCPConnector(limit=0, force_close=True) if self._is_fresh else aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=patience) as http, asyncio.TaskGroup() as tasks:
            for number in range(self._clients):
                own = f"chaos-{number % 7}-{uuid4().hex[:8]}"
                tasks.create_task(self._ask_on(http, own if self._sessions is None else None))

    def stop(self) -> None:
        """Begin no more requests."""
        self._stop.set()

    def count(self, since: int = 0) -> Counter[End]:
        """How the requests ended, from the `since`-th on."""
        return Counter(sight.end for sight in self.sights[since:])

    def failures(self, since: int = 0, *, allowed: Collection[str] = ()) -> Counter[str]:
        """Why requests failed that should not have: broken off, or refused with a code that is not `allowed`."""
        return Counter(
            f"{sight.kind}: {sight.why}"
            for sight in self.sights[since:]
            if sight.end is End.BROKEN
            or (sight.end is End.REFUSED and sight.kind is not Kind.REFUSED and sight.why not in allowed)
        )

    async def _ask_on(self, http: aiohttp.ClientSession, session: str | None) -> None:
        while not self._stop.is_set():
            (kind,) = random.choices(self._kinds, self._weights)
            sight = Sight(kind, session or f"chaos-shared-{random.randrange(self._sessions or 1)}")
            try:
                await self._ask(http, sight)
            except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
                sight.end, sight.why = End.BROKEN, f"{type(error).__name__}: {error}"
                await asyncio.sleep(0.05)
            finally:
                self.sights.append(sight)  # also of a test that has failed: the books are those of the next one too
            if self._pause:
                await asyncio.sleep(random.uniform(0, 2 * self._pause))

    async def _ask(self, http: aiohttp.ClientSession, sight: Sight) -> None:
        headers = {**self._headers, "X-Request-ID": str(sight.request_id), "X-IBEX-Session-ID": sight.session}
        request = http.post(f"{self._url()}/v1/chat/completions", json=_body(sight.kind), headers=headers)
        if sight.kind is Kind.HANG_UP_EARLY:
            try:
                async with asyncio.timeout(random.uniform(0.005, 0.05)), request as response:
                    await _read(response, sight)
            except TimeoutError:
                sight.end = End.LEFT
            return
        async with request as response:
            await _read(response, sight)


async def _read(response: aiohttp.ClientResponse, sight: Sight) -> None:
    if "X-IBEX-Turn-ID" in response.headers:
        sight.turn_id = UUID(response.headers["X-IBEX-Turn-ID"])
    if response.status != 200:
        body = await response.read()
        sight.end, sight.why = End.REFUSED, f"{response.status} {json.loads(body)['error']['code']}"
    elif response.content_type == "application/json":
        usage = json.loads(await response.read())["usage"]
        sight.usage = usage["prompt_tokens"], usage["completion_tokens"]
        sight.end = End.WHOLE
    else:
        await _read_stream(response, sight)


async def _read_stream(response: aiohttp.ClientResponse, sight: Sight) -> None:
    body = b""
    patience = random.randrange(50, 900)
    try:
        async for data in response.content.iter_any():
            body += data
            if sight.kind is Kind.HANG_UP_LATE and len(body) > patience and not body.endswith(DONE):
                sight.end = End.LEFT
                response.close()
                return
    except aiohttp.ClientPayloadError:
        if b'"error"' not in body or not body.endswith(b"\n\n"):
            raise  # not ibex's last word, so its process died
        sight.end = End.CUT
        sight.why = json.loads(body.rstrip().rpartition(b"\n\n")[2].removeprefix(b"data: "))["error"]["code"]
        return
    assert body.endswith(DONE), "a stream that ended cleanly, and is not whole"
    sight.end = End.WHOLE
    chunks = [json.loads(event[6:]) for event in body.split(b"\n\n")[:-2] if event.startswith(b"data: {")]
    usage = next((chunk["usage"] for chunk in reversed(chunks) if chunk.get("usage")), None)
    if usage is not None:
        sight.usage = usage["prompt_tokens"], usage["completion_tokens"]


def _body(kind: Kind) -> dict[str, Any]:
    content = "Reply with exactly: " + " ".join(["word"] * random.randint(1, 12))
    body: dict[str, Any] = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": content}]}
    controls: dict[str, Any] = {}
    match kind:
        case Kind.STREAM | Kind.HANG_UP_LATE:
            body |= {"stream": True}
            if random.random() < 0.5:
                body |= {"stream_options": {"include_usage": True}}
        case Kind.HANG_UP_EARLY:
            controls = {"delay_ms": 300}
        case Kind.CUT:
            body |= {"stream": True}
            controls = {"cut_after": 3}
        case Kind.REFUSED:
            controls = {"status": 422}
        case Kind.JSON:
            controls = {"delay_ms": random.choice([0, 0, 20])}
    return body | ({"metadata": {"sandbox": json.dumps(controls)}} if controls else {})
