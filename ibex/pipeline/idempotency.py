"""Idempotency keys: a request sent twice is answered once; the answer is kept, readable by its caller alone."""

import asyncio
import hmac
import logging
import os
import re
from dataclasses import dataclass, field
from hashlib import sha256
from uuid import UUID

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ibex.domain.identity import Principal
from ibex.domain.turns import TurnId
from ibex.errors import IdempotencyInProgress, IdempotencyKeyReuse, ServiceDegraded, StoreError
from ibex.stores.redis.idempotency import IdempotencyStore, KeyState, idempotency_key
from ibex.stores.redis.lane import RedisLane
from ibex.telemetry import Metrics, spawn

log = logging.getLogger("ibex.idempotency")

MAX_REPLY_BYTES = 1 << 20
RENEW_SECONDS = 3.0
"""How often a running request's lease is renewed, which without that ends after 10 s."""

_NONCE_BYTES = 12
_KEY = re.compile(r"[ -~]{1,256}", re.ASCII)


def is_idempotency_key(text: str) -> bool:
    """Whether a client may send this as its Idempotency-Key: 1–256 printable ASCII characters."""
    return _KEY.fullmatch(text) is not None


class StoredReply(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer, as it is replayed."""

    status: int
    headers: tuple[tuple[str, str], ...]
    """Content type, and what else of the provider's headers rode along."""
    body: bytes
    """The bytes of the body; of a stream all events, the end included."""
    is_streaming: bool
    turn_id: UUID
    """The first answer's turn."""
    external_id: str
    """The first answer's session."""

    def __repr__(self) -> str:
        return f"StoredReply(status={self.status}, turn_id={self.turn_id}, {len(self.body)} bytes)"


_encoder = msgspec.msgpack.Encoder(uuid_format="bytes")
_decoder = msgspec.msgpack.Decoder(StoredReply)


@dataclass(frozen=True, slots=True)
class _Secrets:
    """What a bearer alone can derive: the key that seals its answers, and the one that fingerprints its requests."""

    sealing: bytes = field(repr=False)
    fingerprinting: bytes = field(repr=False)

    @classmethod
    def derive(cls, principal: Principal, bearer: str) -> "_Secrets":
        salt = principal.token_id.bytes
        derivation = HKDF(algorithm=SHA256(), length=64, salt=salt, info=b"ibex idempotency v1")
        material = derivation.derive(bearer.encode("utf-8", "surrogateescape"))
        return cls(material[:32], material[32:])

    def fingerprint(self, principal: Principal, body_sha256: bytes) -> bytes:
        """Names a request without giving its body away: a plain digest of a short body could be guessed."""
        return hmac.digest(self.fingerprinting, principal.agent_id.bytes + body_sha256, sha256)

    def seal(self, reply: StoredReply, key: bytes) -> bytes:
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + AESGCM(self.sealing).encrypt(nonce, _encoder.encode(reply), key)

    def open(self, sealed: bytes, key: bytes) -> StoredReply:
        """Raises InvalidTag for what this bearer did not seal under this key, ValueError for what is no reply."""
        plain = AESGCM(self.sealing).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], key)
        return _decoder.decode(plain)


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """A key held by a running request. It ends by `store` or by `free`, whichever comes first; both may be called."""

    _owner: "Idempotency" = field(repr=False)
    key: bytes
    owner: bytes
    request: bytes = field(repr=False)
    secrets: _Secrets = field(repr=False)

    async def store(self, reply: StoredReply) -> bool:
        """Keep the answer for 24 h. False when that failed: the answer is given all the same, the key is lost."""
        return await self._owner.store(self, reply)

    def store_after(self, committed: asyncio.Future[None], reply: StoredReply) -> "asyncio.Task[bool]":
        """Keep the answer as soon as its turn is committed, whoever goes on waiting; False when it was not committed.

        From this call on `free` does nothing: a client that hangs up now finds its answer when it asks again.
        """
        return self._owner.store_after(self, committed, reply)

    def free(self) -> None:
        """Give the key back, so that the same request may be sent again. Does not wait and never fails."""
        self._owner.free(self)


class Idempotency:
    """Claims keys before a request goes to its provider, renews the claims of those running, keeps their answers."""

    def __init__(self, lane: RedisLane, metrics: Metrics) -> None:
        self._store = IdempotencyStore(lane)
        self._results = metrics.idempotency_total
        self._running: set[Claim] = set()
        self._settling: set[Claim] = set()
        """Those whose reply is whole: they end by `store` alone."""
        self._renewal: asyncio.Task[None] | None = None

    async def claim(
        self, principal: Principal, key: str, bearer: str, body_sha256: bytes, turn_id: TurnId
    ) -> Claim | StoredReply:
        """Claim a key for a turn, or find the answer that was given to the same request.

        Raises IdempotencyKeyReuse when the key was used with another body or agent, or when its answer was too large to
        keep; IdempotencyInProgress when the first request is running; ServiceDegraded when Redis is away.
        """
        secrets = _Secrets.derive(principal, bearer)
        redis_key = idempotency_key(principal.org_id, principal.token_id, key)
        claim = Claim(self, redis_key, turn_id.bytes, secrets.fingerprint(principal, body_sha256), secrets)
        try:
            found = await self._store.claim(claim.key, claim.owner, claim.request)
        except (StoreError, asyncio.CancelledError) as error:
            self._store.free(claim.key, claim.owner)  # the claim may have been made, and nobody will answer it
            if not isinstance(error, StoreError):
                raise
            self._count("redis_error")
            raise ServiceDegraded("The Idempotency-Key cannot be honoured just now. Try again shortly.") from error
        match found.state:
            case KeyState.CLAIMED:
                self._count("miss")
                self._hold(claim)
                return claim
            case KeyState.DONE:
                return self._replay(claim, found.sealed or b"")
            case KeyState.RUNNING:
                self._count("in_progress")
                raise IdempotencyInProgress
            case KeyState.TOO_LARGE:
                self._count("conflict")
                raise IdempotencyKeyReuse(
                    "The request with this Idempotency-Key was answered, and the answer was too large to keep "
                    f"(more than {MAX_REPLY_BYTES:,} bytes). Send a new key to ask again."
                )
            case KeyState.OTHER:
                self._count("conflict")
                raise IdempotencyKeyReuse("This Idempotency-Key was used before with another body or another agent.")

    async def store(self, claim: Claim, reply: StoredReply) -> bool:
        """`Claim.store`."""
        if claim not in self._running:
            return False
        self._running.discard(claim)
        is_small = len(reply.body) <= MAX_REPLY_BYTES
        try:
            if is_small:
                sealed = claim.secrets.seal(reply, claim.key)
                is_kept = await self._store.keep(claim.key, claim.owner, claim.request, sealed)
            else:
                is_kept = await self._store.keep_too_large(claim.key, claim.owner, claim.request)
        except StoreError as error:
            self._count("redis_error")
            log.warning("idempotency key lost", extra={"reason": error.message, "turn_id": str(reply.turn_id)})
            return False
        if not (is_small and is_kept):
            self._count("skipped")
        return is_kept

    def store_after(self, claim: Claim, committed: asyncio.Future[None], reply: StoredReply) -> asyncio.Task[bool]:
        """`Claim.store_after`."""
        self._settling.add(claim)
        return spawn(self._settle(claim, committed, reply), name="idempotent reply")

    async def _settle(self, claim: Claim, committed: asyncio.Future[None], reply: StoredReply) -> bool:
        try:
            await asyncio.shield(committed)
        except StoreError:
            self._settling.discard(claim)
            self.free(claim)
            return False
        await self.store(claim, reply)
        self._settling.discard(claim)
        return True

    def free(self, claim: Claim) -> None:
        """`Claim.free`."""
        if claim in self._running and claim not in self._settling:
            self._running.discard(claim)
            self._store.free(claim.key, claim.owner)

    def _replay(self, claim: Claim, sealed: bytes) -> StoredReply:
        try:
            reply = claim.secrets.open(sealed, claim.key)
        except (InvalidTag, ValueError) as error:
            self._count("redis_error")
            raise ServiceDegraded("The answer kept for this Idempotency-Key cannot be read.") from error
        self._count("hit")
        return reply

    def _hold(self, claim: Claim) -> None:
        self._running.add(claim)
        if self._renewal is None or self._renewal.done():
            self._renewal = spawn(self._renew(), name="idempotency leases")

    async def _renew(self) -> None:
        """Renew the leases for as long as there are any."""
        while self._running:
            await asyncio.sleep(RENEW_SECONDS)
            renewals = [self._store.renew(claim.key, claim.owner, claim.request) for claim in self._running]
            # one that fails is tried again in 3 s; one that was lost shows when its answer is to be kept
            await asyncio.gather(*renewals, return_exceptions=True)

    def _count(self, result: str) -> None:
        self._results.labels(result).inc()
