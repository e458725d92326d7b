"""The verified callers a worker remembers, and how its neighbours learn of them."""

from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from uuid import UUID

import msgspec

from ibex.domain.identity import AgentId, Credential
from ibex.pipeline.changes import now
from ibex.telemetry import Metrics

KNOWN_SECONDS = 900.0
"""A caller not seen for longer is no longer known."""
REREAD_SECONDS = 20.0
"""Entries older than this are read again in the background, before they are STALE_SECONDS old."""
STALE_SECONDS = 30.0

Key = tuple[bytes, AgentId]
"""The SHA-256 of the bearer, and the agent it was presented with."""


@dataclass(slots=True)
class Entry:
    """A credential that was verified, as it was read at `read_at` (boot-clock seconds)."""

    credential: Credential
    read_at: float
    used_at: float

    @property
    def is_expired(self) -> bool:
        """Whether the token's life is over, counted from the database's clock at the read."""
        left = self.credential.expires_in
        return left is not None and now() - self.read_at >= left

    @property
    def is_stale(self) -> bool:
        """Whether it must be read again before it is used, while Postgres can be asked."""
        return now() - self.read_at > STALE_SECONDS


class PrincipalCache:
    """A bounded LRU of verified credentials, by bearer digest and agent."""

    def __init__(self, size: int, metrics: Metrics) -> None:
        self._size = size
        self._entries: OrderedDict[Key, Entry] = OrderedDict()
        self._keys: defaultdict[UUID, set[Key]] = defaultdict(set)
        """The entries that rest on each id, so that a change costs what it touches and not the whole cache."""
        self._metrics = metrics

    def get(self, key: Key) -> Entry | None:
        """The entry, marked as used."""
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
            entry.used_at = now()
        return entry

    def put(self, key: Key, credential: Credential, read_at: float, used_at: float) -> None:
        """Remember a credential; the one used longest ago goes for want of room."""
        self._remove(key)
        self._entries[key] = Entry(credential, read_at, used_at)
        for entity_id in ids_of(credential):
            self._keys[entity_id].add(key)
        if len(self._entries) > self._size:
            self._remove(next(iter(self._entries)))
            self._metrics.auth_cache_lru_evictions_total.inc()
        self._metrics.auth_cache_lru_size.set(len(self._entries))

    def drop(self, key: Key) -> None:
        """Forget one entry."""
        self._remove(key)
        self._metrics.auth_cache_lru_size.set(len(self._entries))

    def _remove(self, key: Key) -> None:
        entry = self._entries.pop(key, None)
        for entity_id in ids_of(entry.credential) if entry is not None else ():
            self._keys[entity_id].discard(key)
            if not self._keys[entity_id]:
                del self._keys[entity_id]

    def keys_resting_on(self, entity_id: UUID | None) -> list[Key]:
        """The entries that rest on this token, agent, user or organization; all of them for None."""
        return list(self._entries if entity_id is None else self._keys.get(entity_id, ()))

    def due_for_reread(self) -> Iterator[tuple[Key, Entry]]:
        """Entries in use that will soon be stale; those out of use are forgotten on the way."""
        moment = now()
        for key, entry in list(self._entries.items()):
            if moment - entry.used_at > KNOWN_SECONDS:
                self.drop(key)
            elif moment - entry.read_at > REREAD_SECONDS:
                yield key, entry


def ids_of(credential: Credential) -> tuple[UUID, ...]:
    """Everything whose change makes a credential worth nothing."""
    return (credential.token_id, credential.agent_id, credential.user_id, credential.org_id)


class SharedFill(msgspec.Struct, array_like=True):
    """A fill on its way to this node's other workers, through the supervisor's memory: digest and row, no secret."""

    credential: Credential
    read_at: float


_encoder = msgspec.msgpack.Encoder(uuid_format="bytes")
_decoder = msgspec.msgpack.Decoder(SharedFill)


def encode_fill(credential: Credential, read_at: float) -> bytes:
    """A fill as the neighbours take it."""
    return _encoder.encode(SharedFill(credential, read_at))


def decode_fill(payload: bytes) -> SharedFill:
    """Read a neighbour's fill."""
    return _decoder.decode(payload)
