"""How the pipeline answers: a call comes in as plain values, a reply goes out through three methods."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol
from uuid import UUID

from ibex.errors import RequestError
from ibex.telemetry import RequestTrace, StageClock


@dataclass(slots=True, repr=False)
class Call:
    """One chat request, as the server hands it over: what was presented, and how to read the body.

    It has no repr of its fields: one of them is a bearer token.
    """

    authorization: str | None
    agent_id: str | None
    session_id: str | None
    idempotency_key: str | None
    address: str
    request_id: UUID
    clock: StageClock
    read_body: Callable[[], Awaitable[bytes]]
    trace: RequestTrace | None = None
    openai_beta: str | None = None
    path_org: str | None = None
    """The organization the path names, as written; None: it names none."""
    headers: dict[str, str] = field(default_factory=dict)
    """Headers of the response, filled in as they become known; errors carry them too."""

    @property
    def trace_headers(self) -> tuple[tuple[bytes, bytes], ...]:
        """What rides along to the provider besides ibex's own fields."""
        fields = []
        if self.trace is not None:
            fields.append((b"traceparent", self.trace.traceparent.encode()))
            if self.trace.tracestate is not None:
                fields.append((b"tracestate", self.trace.tracestate.encode()))
        if self.openai_beta is not None:
            fields.append((b"OpenAI-Beta", self.openai_beta.encode()))
        return tuple(fields)


class Reply(Protocol):
    """What a server implements: the way back to one client.

    `begin` only notes the head. It leaves with the first byte after it, so that a reply whose turn cannot be kept can
    still become an error.
    """

    @property
    def has_left(self) -> bool:
        """Whether the head is on its way: from then on nothing but the body can follow."""
        ...

    @property
    def interruption(self) -> RequestError | None:
        """Why the server is cutting it off; None: it is not, and a cancellation means that the client has left."""
        ...

    def begin(self, status: int, headers: Mapping[str, str], *, length: int | None) -> None:
        """Note the head; `length` is None for a stream."""
        ...

    async def write(self, data: bytes) -> None:
        """Send some of the body. Waits while the client is slow; is cancelled when it hangs up."""
        ...

    async def finish(self, last: bytes) -> None:
        """Send the last bytes and end the body: from here on the client has seen the end, so the turn must be kept."""
        ...

    async def cut(self, error: RequestError) -> None:
        """End a reply that is under way so that nobody takes it for whole: a stream says why in a last item."""
        ...
