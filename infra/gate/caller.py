"""A caller of the house: asks for completions, whole and streamed, and notes when what came arrived."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

MODEL = "gpt-4o-mini"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, and where."""

    url: str
    bearer: str = field(repr=False)
    agent_id: str

    @property
    def headers(self) -> dict[str, str]:
        """What each of its requests presents."""
        return {"Authorization": f"Bearer {self.bearer}", "X-IBEX-Agent-ID": self.agent_id}


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer, or as much of it as came."""

    status: int
    headers: Mapping[str, str]
    pieces: Sequence[tuple[float, bytes]]
    """The body as it arrived: when (`time.perf_counter`) and what."""
    sent_at: float
    """By the wall clock (s)."""

    @property
    def body(self) -> bytes:
        """All of it."""
        return b"".join(piece for _, piece in self.pieces)

    @property
    def turn_id(self) -> str:
        """The turn it belongs to."""
        return self.headers["X-IBEX-Turn-ID"]

    @property
    def ended_at(self) -> float:
        """When the last piece arrived (`time.perf_counter`)."""
        return self.pieces[-1][0]

    @property
    def is_whole(self) -> bool:
        """Whether it is a completion, or a stream of one to its end."""
        if self.status != 200:
            return False
        if self.headers["Content-Type"].startswith("text/event-stream"):
            return self.body.endswith(b"data: [DONE]\n\n")
        return bool(msgspec.json.decode(self.body)["choices"])

    @property
    def text(self) -> str:
        """What the model said."""
        if not self.headers["Content-Type"].startswith("text/event-stream"):
            return str(msgspec.json.decode(self.body)["choices"][0]["message"]["content"])
        items = [line[6:] for line in self.body.split(b"\n") if line.startswith(b"data: {")]
        deltas = (choice["delta"] for item in items for choice in msgspec.json.decode(item)["choices"])
        return "".join(delta.get("content") or "" for delta in deltas)


def question(words: str, *, is_streaming: bool = False, **sandbox: Any) -> dict[str, Any]:
    """A chat's body; `sandbox` is what the stand-in is asked to do (`ibex.sandbox.requests.Controls`)."""
    body: dict[str, Any] = {
        "model": MODEL,
        "stream": is_streaming,
        "messages": [{"role": "user", "content": words}],
    }
    return body | {"metadata": {"sandbox": sandbox}} if sandbox else body


async def ask(
    client: aiohttp.ClientSession,
    caller: Caller,
    body: Mapping[str, Any] | None = None,
    *,
    path: str = "/v1/chat/completions",
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """Ask the house; without a body it is a GET."""
    sent_at = time.time()
    async with client.request(
        "GET" if body is None else "POST",
        caller.url + path,
        json=body,
        headers={**caller.headers, **(headers or {})},
    ) as response:
        pieces = [(time.perf_counter(), piece) async for piece in response.content.iter_any()]
        return Answer(response.status, response.headers.copy(), pieces, sent_at)
