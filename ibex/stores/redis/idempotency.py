"""Idempotency keys in Redis: who is answering one, or what the sealed answer was."""

from enum import StrEnum
from hashlib import sha256
from typing import Any, NamedTuple

from ibex.domain.identity import OrgId, TokenId
from ibex.stores.redis.connection import Argument
from ibex.stores.redis.lane import RedisLane

CALL_SECONDS = 1.0
"""The deadline of a call: only requests that send a key wait for these."""
LEASE_MS = 10_000
"""How long a running request holds its key without a renewal."""
KEPT_MS = 24 * 60 * 60 * 1000


class KeyState(StrEnum):
    """What a key was found to be."""

    CLAIMED = "claimed"
    """It was free; now the caller holds it."""
    OTHER = "other"
    """It was used with another request."""
    RUNNING = "running"
    TOO_LARGE = "too_large"
    """It was answered, by more than can be kept."""
    DONE = "done"


class Found(NamedTuple):
    """What a claim met."""

    state: KeyState
    sealed: bytes | None
    """The answer, when it is done."""


# A key is a hash of `state` (running, done, too_large), `request` (the fingerprint), `owner` (while running) and
# `reply` (when done). A lease that ran out is a key that is gone. The scripts are sent by their text: a digest that
# Redis does not know costs a round trip, in which a later command of the same request would overtake this one.
_CLAIM = """\
local state, request, reply = unpack(redis.call('HMGET', KEYS[1], 'state', 'request', 'reply'))
if not state then
  redis.call('HSET', KEYS[1], 'state', 'running', 'request', ARGV[2], 'owner', ARGV[1])
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
  return {'claimed'}
end
if request ~= ARGV[2] then return {'other'} end
return {state, reply}
"""
# Writing is fenced: by the owner, or where nobody holds the key, so that an answer whose lease ran out is kept unless
# somebody else took the key. A finished key has no owner, so that a renewal that was under way cannot reopen it.
_WRITE = """\
local owner, state = unpack(redis.call('HMGET', KEYS[1], 'owner', 'state'))
if state and owner ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'state', ARGV[3], 'request', ARGV[2])
if ARGV[3] == 'running' then
  redis.call('HSET', KEYS[1], 'owner', ARGV[1])
else
  redis.call('HDEL', KEYS[1], 'owner')
  redis.call('HSET', KEYS[1], 'reply', ARGV[5])
end
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return 1
"""
_FREE = """\
if redis.call('HGET', KEYS[1], 'owner') == ARGV[1] then redis.call('DEL', KEYS[1]) end
return 1
"""


def idempotency_key(org_id: OrgId, token_id: TokenId, client_key: str) -> bytes:
    """The Redis key of a client's Idempotency-Key, which is kept as a digest: it is the client's own text."""
    return f"ibex:idempotency:{{{org_id}}}:{token_id}:{sha256(client_key.encode()).hexdigest()}".encode()


class IdempotencyStore:
    """The keys. `owner` names one claim; `request` is the fingerprint of what was asked."""

    def __init__(self, lane: RedisLane) -> None:
        self._lane = lane

    async def claim(self, key: bytes, owner: bytes, request: bytes) -> Found:
        """Take a key that is free for the lease's time, or say what it is; raises StoreError."""
        state, *sealed = await self._call(_CLAIM, key, owner, request, LEASE_MS)
        return Found(KeyState(state.decode()), sealed[0] if sealed else None)

    async def renew(self, key: bytes, owner: bytes, request: bytes) -> bool:
        """Begin the lease anew; False when another holds the key. Raises StoreError."""
        return await self._write(key, owner, request, "running", LEASE_MS, b"")

    async def keep(self, key: bytes, owner: bytes, request: bytes, sealed: bytes) -> bool:
        """Keep an answer for 24 h; False when another holds the key. Raises StoreError."""
        return await self._write(key, owner, request, KeyState.DONE, KEPT_MS, sealed)

    async def keep_too_large(self, key: bytes, owner: bytes, request: bytes) -> bool:
        """Keep for 24 h that there was an answer; False when another holds the key. Raises StoreError."""
        return await self._write(key, owner, request, KeyState.TOO_LARGE, KEPT_MS, b"")

    def free(self, key: bytes, owner: bytes) -> None:
        """Give a key back, at once and without waiting; where that fails, the lease runs out."""
        self._lane.send(_ignore, "EVAL", _FREE, 1, key, owner, deadline=CALL_SECONDS)
        self._lane.flush()

    async def _write(self, key: bytes, owner: bytes, request: bytes, state: str, ttl_ms: int, sealed: bytes) -> bool:
        return bool(await self._call(_WRITE, key, owner, request, state, ttl_ms, sealed))

    async def _call(self, script: str, key: bytes, *args: Argument) -> Any:
        return await self._lane.call("EVAL", script, 1, key, *args, deadline=CALL_SECONDS)


def _ignore(_: Any) -> None:
    pass
