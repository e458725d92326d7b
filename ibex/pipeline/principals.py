"""The verified callers a worker remembers, what each amounts to, and how its neighbours learn of them."""

from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from uuid import UUID

import msgspec

from ibex.domain.identity import AgentId, Credential, Principal, parse_uuid, verify_digest
from ibex.errors import (
    AgentNotAuthorized,
    AgentSuspended,
    InsufficientPermissions,
    MissingAgentId,
    OrgSuspended,
    RequestError,
    UserSuspended,
    ValidationFailed,
)
from ibex.telemetry import Metrics

KNOWN_SECONDS = 900.0
"""A caller not seen for longer is no longer known."""
REREAD_SECONDS = 20.0
"""Entries older than this are read again in the background, before they are 30 s old."""

NO_AGENT = AgentId(UUID(int=0))
"""Asked for where no agent was named: the token is judged first all the same."""

Key = tuple[bytes, str]
"""The SHA-256 of the bearer, and the agent's id it was presented with, in lower case."""


@dataclass(slots=True)
class Entry:
    """A credential that was verified, as it was read at `read_at` (boot-clock seconds)."""

    credential: Credential
    read_at: float
    used_at: float
    expires_at: float
    """By the boot clock, from the database's clock at the read; inf: never."""
    permissions: int
    principal: Principal | None
    """Who asks, for all that permissions leave open; None: refused whatever is asked (`find_fault` says why)."""
    told_at: float = -inf
    """When the neighbours and the database last heard that it is in use."""
    is_void: bool = False
    """It has changed since: no more is known than that its bearer was good, and it must be read before it serves."""


def make_entry(credential: Credential, read_at: float, used_at: float) -> Entry:
    """What a read amounts to."""
    is_refused = find_fault(credential, 0, str(credential.agent_id)) is not None
    return Entry(
        credential,
        read_at,
        used_at,
        expires_at=inf if credential.expires_in is None else read_at + credential.expires_in,
        permissions=int(credential.permissions),
        principal=None if is_refused else _make_principal(credential),
    )


def is_valid(credential: Credential, digest: bytes) -> bool:
    """Whether the bearer with this digest is the token's, and the token neither revoked nor expired."""
    is_alive = credential.expires_in is None or credential.expires_in > 0
    return verify_digest(digest, credential.digest) and not credential.is_revoked and is_alive


def find_fault(credential: Credential, needs: int, agent_header: str | None) -> RequestError | None:
    """Why a caller with a valid token is refused, in the contract's order: its token first, then its agent."""
    if credential.org_status != "active":
        return OrgSuspended()
    if credential.user_status != "active":
        return UserSuspended()
    if int(credential.permissions) & needs != needs:
        return InsufficientPermissions()
    if not agent_header:
        return MissingAgentId()
    if parse_uuid(agent_header) is None:
        return ValidationFailed("`X-IBEX-Agent-ID` must be a UUID.", param="X-IBEX-Agent-ID")
    if credential.agent_status is None or credential.bound_agent_id not in {None, credential.agent_id}:
        return AgentNotAuthorized()
    if credential.agent_status != "active":
        return AgentSuspended()
    return None


def _make_principal(credential: Credential) -> Principal:
    return Principal(
        token_id=credential.token_id,
        org_id=credential.org_id,
        user_id=credential.user_id,
        agent_id=credential.agent_id,
        permissions=credential.permissions,
        org_rpm=credential.org_rpm,
        agent_rpm=credential.agent_rpm,
        was_cached=True,
    )


def ids_of(credential: Credential) -> tuple[UUID, ...]:
    """Everything whose change makes a credential worth nothing."""
    return (credential.token_id, credential.agent_id, credential.user_id, credential.org_id)


class PrincipalCache:
    """A bounded LRU of verified credentials, by bearer digest and agent."""

    def __init__(self, size: int, metrics: Metrics) -> None:
        self._size = size
        self._entries: OrderedDict[Key, Entry] = OrderedDict()
        self._keys: defaultdict[UUID | bytes, set[Key]] = defaultdict(set)
        """The entries that rest on each id, so that a change costs what it touches and not the whole cache; and those
        of each bearer's digest."""
        self._evictions = metrics.auth_cache_lru_evictions_total.labels()
        self._level = metrics.auth_cache_lru_size.labels()

    def get(self, key: Key, moment: float) -> Entry | None:
        """The entry, void and expired ones too, marked as used at `moment`; None for one unused too long."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if moment - entry.used_at > KNOWN_SECONDS:
            self.drop(key)
            return None
        self._entries.move_to_end(key)
        entry.used_at = moment
        return entry

    def peek(self, key: Key) -> Entry | None:
        """The entry, without using it."""
        return self._entries.get(key)

    def knows_bearer(self, digest: bytes) -> bool:
        """Whether the bearer is known good, with whatever agent."""
        return digest in self._keys

    def put(self, key: Key, entry: Entry) -> None:
        """Remember an entry, in the place of its former self; the one used longest ago goes for want of room."""
        former = self._entries.get(key)
        if former is not None:
            self._unlink(key, former)
        self._entries[key] = entry
        for thing in _supports(key, entry):
            self._keys[thing].add(key)
        if len(self._entries) > self._size:
            self.drop(next(iter(self._entries)))
            self._evictions.inc()
        self._level.set(len(self._entries))

    def drop(self, key: Key) -> None:
        """Forget one entry, if it is there."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._unlink(key, entry)
            self._level.set(len(self._entries))

    def void(self, entity_id: UUID | None) -> int:
        """Let nothing that rests on this id serve before it is read again; all of them for None. How many did."""
        keys = self._entries.keys() if entity_id is None else self._keys.get(entity_id, ())
        voided = [entry for key in keys if not (entry := self._entries[key]).is_void]
        for entry in voided:
            entry.is_void = True
        return len(voided)

    def due_for_reread(self, moment: float) -> Iterator[tuple[Key, Entry]]:
        """Entries in use that will soon be old, or are void; those out of use are forgotten on the way.

        The cache may change between one and the next.
        """
        for key, entry in list(self._entries.items()):
            if self._entries.get(key) is not entry:
                continue
            if moment - entry.used_at > KNOWN_SECONDS:
                self.drop(key)
            elif entry.is_void or moment - entry.read_at > REREAD_SECONDS:
                yield key, entry

    def _unlink(self, key: Key, entry: Entry) -> None:
        for thing in _supports(key, entry):
            resting = self._keys[thing]
            resting.discard(key)
            if not resting:
                del self._keys[thing]


def _supports(key: Key, entry: Entry) -> tuple[UUID | bytes, ...]:
    return (*ids_of(entry.credential), key[0])


class SharedFill(msgspec.Struct, array_like=True):
    """A fill on its way to this node's other workers, through the supervisor's memory: digest and row, no secret."""

    credential: Credential
    read_at: float


_encoder = msgspec.msgpack.Encoder(uuid_format="bytes")
_decoder = msgspec.msgpack.Decoder(SharedFill)


def encode_fill(credential: Credential, read_at: float) -> bytes:
    """A fill as the neighbours take it."""
    return _encoder.encode(SharedFill(credential, read_at))


def decode_fill(payload: bytes) -> SharedFill | None:
    """Read a neighbour's fill; None for one of another version of ibex, which a rolling restart brings."""
    try:
        return _decoder.decode(payload)
    except msgspec.DecodeError:
        return None
