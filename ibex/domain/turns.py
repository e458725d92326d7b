"""Sessions and turns: one finished request that reached for a provider, as data, and the ids that name it."""

import os
import re
import time
from enum import StrEnum
from typing import NewType
from uuid import UUID, SafeUUID, uuid5

import msgspec

from ibex.domain.identity import AgentId, OrgId

TurnId = NewType("TurnId", UUID)
SessionId = NewType("SessionId", UUID)

_SESSION_NAMESPACE = UUID("6f6c2b1e-52a0-5c5e-9a43-1f0a3a6b8b52")
_EXTERNAL_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}", re.ASCII)


class Outcome(StrEnum):
    """How a turn ended (the table of contract section 9)."""

    OK = "ok"
    INCOMPLETE = "incomplete"
    CLIENT_DISCONNECT = "client_disconnect"
    PROVIDER_ERROR = "provider_error"
    REPLAYED = "replayed"


class _RandomPool:
    """Random bytes of the system's, taken 4 KiB at a time: a system call for each id would cost more than the id."""

    def __init__(self) -> None:
        self._bytes = b""
        self._taken = 0

    def take(self, count: int) -> bytes:
        start = self._taken
        if start + count > len(self._bytes):
            self._bytes, start = os.urandom(4096), 0
        self._taken = start + count
        return self._bytes[start : start + count]


_random = _RandomPool()
_LOW_62 = (1 << 62) - 1
_new_uuid, _set_attribute = object.__new__, object.__setattr__


def mint_uuid7() -> UUID:
    """A UUID version 7: 48 bits of Unix milliseconds, then random bits. Children are exec'd: none shares the pool."""
    random = int.from_bytes(_random.take(10), "big")
    value = time.time_ns() // 1_000_000 << 80 | 0x7 << 76 | (random >> 68 & 0xFFF) << 64 | 0b10 << 62
    # UUID's constructor checks its arguments, which costs more than all the rest
    uuid = _new_uuid(UUID)
    _set_attribute(uuid, "int", value | random & _LOW_62)
    _set_attribute(uuid, "is_safe", SafeUUID.unknown)
    return uuid


def mint_turn_id() -> TurnId:
    """The key of everything that is stored once; never taken from a header."""
    return TurnId(mint_uuid7())


def is_external_id(text: str) -> bool:
    """Whether a client may call its session this: 1–64 of `A-Za-z0-9._:-`."""
    return _EXTERNAL_ID.fullmatch(text) is not None


def derive_session_id(org_id: OrgId, agent_id: AgentId, external_id: str) -> SessionId:
    """The session's id: a uuid5 of the three that make it unique, so that every process knows it without asking."""
    return SessionId(uuid5(_SESSION_NAMESPACE, f"{org_id}/{agent_id}/{external_id}"))


class Turn(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One finished turn: what the journal holds, and what becomes a checkpoint and a trace.

    Field names are the column names of both databases. Times are Unix microseconds; latencies carry their unit. Fields
    are only ever added, with a default: versions N and N−1 read each other's journals.
    """

    turn_id: UUID
    request_id: UUID
    org_id: UUID
    agent_id: UUID
    external_id: str
    """The session's external id (`session_id` in ClickHouse)."""
    outcome: Outcome
    has_checkpoint: bool
    """Whether this ending leaves a checkpoint in Postgres, or a trace alone."""
    is_complete: bool
    is_streaming: bool
    status_code: int
    """The HTTP status the client was given (499 when it had left)."""
    error_code: str | None = None
    replay_of: UUID | None = None
    model: str
    provider: str
    provider_request_id: str | None = None
    directive_version: int | None = None
    attempts: int = 0
    messages_sha256: bytes = b""
    completion_sha256: bytes | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    total_tokens: int | None = None
    usage_source: str = "none"
    requested_at: int
    started_at: int
    """When the turn went to the provider."""
    completed_at: int
    auth_latency_us: int = 0
    rate_limit_latency_us: int = 0
    directive_latency_us: int = 0
    overhead_latency_us: int = 0
    provider_ttfb_ms: float | None = None
    provider_latency_ms: float | None = None
    total_latency_ms: float = 0.0
    messages: bytes | None = None
    """The client's messages as it wrote them, only with content capture."""
    completion: bytes | None = None
    """The provider's reply as it came, only with content capture."""

    @property
    def session_id(self) -> SessionId:
        """The session this turn belongs to."""
        return derive_session_id(OrgId(self.org_id), AgentId(self.agent_id), self.external_id)


_encoder = msgspec.msgpack.Encoder(uuid_format="bytes")
_decoder = msgspec.msgpack.Decoder(Turn)


def encode_turn(turn: Turn) -> bytes:
    """The journal's payload of a turn (MessagePack)."""
    return _encoder.encode(turn)


def decode_turn(payload: bytes) -> Turn:
    """Read a journal payload; raises ValueError when it is not a turn."""
    try:
        return _decoder.decode(payload)
    except msgspec.DecodeError as error:
        raise ValueError(f"not a turn: {error}") from None
