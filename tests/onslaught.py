"""Clients that ask through ibex while its provider attacks, and the judgement of what they saw."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from uuid import UUID, uuid4

import aiohttp

from tests.hostility import Attack

TIMEOUTS = {"provider_first_byte_seconds": 1.5, "provider_idle_seconds": 1.5, "stream_max_seconds": 2.0}
"""Settings of a server under attack."""
PATIENCE = TIMEOUTS["stream_max_seconds"] + 5.0
"""How long (s) an answer may take at most: the longest deadline, and a margin for a busy machine."""
HONEST_EVERY = 10
"""So many attacks to an honest request, whose answer must be its own."""


class Record(Protocol):
    """What was recorded of a turn."""

    outcome: str
    status_code: int
    error_code: str | None


@dataclass
class Sight:
    """One request as its client saw it."""

    attack: Attack | None
    """None: an honest request."""
    request_id: UUID = field(default_factory=uuid4)
    status: int = 0
    code: str | None = None
    """Of the error that was the answer, or that ended it."""
    body: bytes = b""
    """The reply, without an error item after it."""
    is_whole: bool = False
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """For people."""
        return self.attack.name if self.attack is not None else "an honest request"


class Onslaught:
    """So many clients at once, each asking for one attack after another."""

    def __init__(self, url: str, headers: Mapping[str, str], *, clients: int) -> None:
        self.sights: list[Sight] = []
        self._url = url
        self._headers = headers
        self._clients = clients

    async def run(self, attacks: Iterable[Attack]) -> None:
        """Ask for all of them, honest requests in between."""
        waiting = iter(attacks)
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http,
            asyncio.TaskGroup() as tasks,
        ):
            for number in range(self._clients):
                tasks.create_task(self._ask_on(http, waiting, number))

    async def _ask_on(self, http: aiohttp.ClientSession, waiting: Iterable[Attack], number: int) -> None:
        for asked, attack in enumerate(waiting):
            await self._ask(http, attack, f"hostile-{number}")
            if asked % HONEST_EVERY == HONEST_EVERY - 1:
                await self._ask(http, None, f"hostile-{number}")

    async def _ask(self, http: aiohttp.ClientSession, attack: Attack | None, session: str) -> None:
        sight = Sight(attack)
        self.sights.append(sight)
        headers = {**self._headers, "X-Request-ID": str(sight.request_id), "X-IBEX-Session-ID": session}
        body: dict[str, Any] = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": _say(sight)}]}
        if attack is not None:
            body |= {"stream": attack.is_streaming, "metadata": {"sandbox": json.dumps(attack.controls)}}
        begun = time.monotonic()
        async with http.post(f"{self._url}/v1/chat/completions", json=body, headers=headers) as response:
            sight.status = response.status
            try:
                async for data in response.content.iter_any():
                    sight.body += data
                sight.is_whole = response.status == 200
            except aiohttp.ClientPayloadError:
                sight.body, _, last = sight.body.rpartition(b"data: ")
                sight.code = json.loads(last)["error"]["code"]
        if response.status != 200:
            sight.code = json.loads(sight.body)["error"]["code"]
        sight.seconds = time.monotonic() - begun

    def faults(self, find: Callable[[UUID], Record | None]) -> list[str]:
        """Everything that was not as it must be; `find` tells what was recorded of a request."""
        found = [
            f"{sight.name}: {fault} ({sight.status} {sight.code}, {sight.body[-80:]!r})"
            for sight in self.sights
            for fault in (*_judge_sight(sight), *_judge_record(sight, find(sight.request_id)))
        ]
        ids = Counter(sight.request_id for sight in self.sights)
        return found + [f"{request_id} twice" for request_id, count in ids.items() if count > 1]


def _say(sight: Sight) -> str:
    return f"Reply with exactly: {sight.request_id}"


def _judge_sight(sight: Sight) -> list[str]:
    if sight.seconds > PATIENCE:
        return [f"took {sight.seconds:.1f} s"]
    if sight.attack is None:
        is_own = sight.is_whole and str(sight.request_id).encode() in sight.body
        return [] if is_own else ["was not answered with its own reply"]
    expected = sight.attack.expected
    if expected is None:
        return []
    faults = []
    if (sight.status, sight.code, sight.is_whole) != (expected.status, expected.code, expected.is_whole):
        faults.append(f"not {expected.status} {expected.code}")
    if expected.body is not None and sight.body != expected.body:
        faults.append(f"not the body {expected.body[-80:]!r}")
    return faults


def _judge_record(sight: Sight, record: Record | None) -> list[str]:
    """The turn must say of every request what its client saw."""
    if record is None:
        return ["left no turn"]
    if sight.status != 200:
        seen = ("provider_error", sight.status, sight.code)
    else:
        seen = ("ok" if sight.is_whole else "incomplete", 200, sight.code)
    recorded = (str(record.outcome), record.status_code, record.error_code)
    return [] if recorded == seen else [f"recorded as {recorded}"]
