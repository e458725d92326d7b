"""Who is asking: a bearer token and an agent become a principal, from memory when this node knows them."""

import logging
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import NoReturn, Protocol
from uuid import UUID

from ibex.domain.identity import (
    DEV_TOKEN,
    PROXY_CHAT,
    AgentId,
    Credential,
    Principal,
    TokenId,
    digest_bearer,
    parse_bearer,
    parse_uuid,
)
from ibex.errors import InvalidToken, MissingToken, RequestError, ServiceDegraded, StoreError
from ibex.pipeline.changes import ChangeFollower, now
from ibex.pipeline.principals import (
    KNOWN_SECONDS,
    NO_AGENT,
    Entry,
    Key,
    PrincipalCache,
    decode_fill,
    encode_fill,
    find_fault,
    ids_of,
    is_valid,
    make_entry,
)
from ibex.pipeline.rereading import Rereader
from ibex.pipeline.single_flight import SingleFlight
from ibex.pipeline.strangers import Refusals, StrangerGate
from ibex.stores.postgres.identity import IdentityReader
from ibex.telemetry import Metrics

log = logging.getLogger("ibex.authentication")

FILL_ATTEMPTS = 3
FILL_SECONDS = 2.0
"""How long one read of a credential may take, waiting for a connection too."""

PROXY_CHAT_BITS = int(PROXY_CHAT)
"""As a plain int: on the hot path IntFlag's operators cost more than the rest of the check."""


class Share(Protocol):
    """Gives a payload to the node's other workers; a later one with the same key replaces it for those yet to start."""

    def __call__(self, payload: bytes, *, key: bytes | None = None) -> None: ...


def keep_to_oneself(payload: bytes, *, key: bytes | None = None) -> None:
    """What a process without neighbours shares."""


class Authenticator:
    """Turns what a request presents into a principal, or says why not.

    A hit costs no network and no task. A fill that read its rows before one of them changed never lands after it: it
    is read again. A change does not make a caller unknown, only its entry void until it has been read again.
    """

    def __init__(
        self,
        reader: IdentityReader,
        follower: ChangeFollower,
        metrics: Metrics,
        *,
        cache_size: int,
        accepts_dev_token: bool,
        share: Share = keep_to_oneself,
        workers: int = 1,
    ) -> None:
        self._reader = reader
        self._follower = follower
        self._accepts_dev_token = accepts_dev_token
        self._cache = PrincipalCache(cache_size, metrics)
        self._refusals = Refusals()
        self._gate = StrangerGate(workers=workers)
        self._fills: SingleFlight[Key, Entry | None] = SingleFlight("credential fill")
        self._share = share
        self._rereader = Rereader(reader, follower, self._cache, self._tell)
        self._seconds = metrics.auth_duration_seconds.labels()
        self._hits = metrics.auth_cache_hits_total.labels("lru")
        self._misses = metrics.auth_cache_misses_total.labels("lru")
        self._negative_hits = metrics.auth_cache_hits_total.labels("negative")
        self._negative_misses = metrics.auth_cache_misses_total.labels("negative")
        self._voided = metrics.revocation_invalidate_total.labels()
        follower.listen(self._void)

    async def authenticate(
        self, authorization: str | None, agent_header: str | None, address: str, *, needs: int = PROXY_CHAT_BITS
    ) -> Principal:
        """The principal behind `Authorization` and `X-IBEX-Agent-ID`, with the permissions it `needs`.

        Raises the RequestError that refuses it: the token is judged first, then the agent.
        """
        began = perf_counter()
        try:
            bearer = read_bearer(authorization)
            key = (digest_bearer(bearer), agent_header.lower() if agent_header else "")
            moment = now()
            entry, was_cached = self._cache.get(key, moment), True
            if entry is not None and _serves(entry, moment) and self._follower.is_current(moment):
                self._hits.inc()
            else:
                entry, was_cached = await self._find(bearer, key, address)
            principal = entry.principal
            if principal is None or entry.permissions & needs != needs:
                _refuse(entry.credential, needs, agent_header)
            return principal if was_cached else replace(principal, was_cached=False)
        finally:
            self._seconds.observe(perf_counter() - began)

    async def reread_forever(self) -> NoReturn:
        """Keep what is remembered fresh (`Rereader.run`)."""
        await self._rereader.run()

    def take_shared(self, payload: bytes) -> None:
        """Remember what another worker of this node has verified; what has changed since is known, but void."""
        fill = decode_fill(payload)
        if fill is None or now() - fill.read_at > KNOWN_SECONDS:
            return
        credential = fill.credential
        key = (credential.digest, str(credential.agent_id))
        former = self._cache.peek(key)
        entry = make_entry(credential, fill.read_at, fill.read_at)
        entry.told_at = fill.read_at
        entry.is_void = self._follower.changed_since(fill.read_at, ids_of(credential))
        if former is not None:
            former.told_at = max(former.told_at, entry.told_at)
            entry.used_at = former.used_at = max(former.used_at, entry.used_at)
            if entry.is_void or former.read_at >= entry.read_at:
                return
        self._cache.put(key, entry)
        if entry.is_void:  # a worker that has just started is told everything anew
            self._rereader.hurry()

    async def _find(self, bearer: str, key: Key, address: str) -> tuple[Entry, bool]:
        """The entry after whatever waiting it takes, and whether it was remembered."""
        entry = self._cache.peek(key)
        if entry is not None and _serves(entry, now()):
            await self._follower.ensure_current()
            entry = self._cache.peek(key)
            if entry is not None and _serves(entry, now()):
                self._hits.inc()
                return entry, True
        self._misses.inc()
        return await self._look_up(bearer, key, address), False

    async def _look_up(self, bearer: str, key: Key, address: str) -> Entry:
        refusal = self._refusals.find(key)
        if refusal is not None:
            self._negative_hits.inc()
            entry = refusal.entry
        else:
            token_id = parse_bearer(bearer)
            if token_id is None or (bearer == DEV_TOKEN and not self._accepts_dev_token):
                raise InvalidToken
            entry = await self._fills.run(key, partial(self._fill, token_id, key, address))
        if entry is None:
            raise InvalidToken
        return entry

    async def _fill(self, token_id: TokenId, key: Key, address: str) -> Entry | None:
        """Read a credential and remember the verdict; None for a token that is not valid."""
        if self._cache.peek(key) is None:
            self._negative_misses.inc()
            if self._cache.knows_bearer(key[0]):
                await self._gate.enter_known(token_id)
            else:
                await self._gate.enter(address)
        agent_id = AgentId(parse_uuid(key[1]) or NO_AGENT)
        for _ in range(FILL_ATTEMPTS):
            if not await self._follower.catch_up():
                raise _cannot_check()
            began = now()
            credential = await self._read(token_id, agent_id)
            ids = (token_id, agent_id) if credential is None else ids_of(credential)
            if not self._follower.changed_since(began, ids):
                return self._settle(key, token_id, credential, began)
        raise _cannot_check()

    async def _read(self, token_id: TokenId, agent_id: AgentId) -> Credential | None:
        try:
            return await self._reader.find_credential(token_id, agent_id, timeout=FILL_SECONDS)
        except StoreError as error:
            log.warning("a credential could not be read", extra={"reason": error.message})
            raise _cannot_check() from None

    def _settle(self, key: Key, token_id: TokenId, credential: Credential | None, read_at: float) -> Entry | None:
        if credential is None or not is_valid(credential, key[0]):
            self._cache.drop(key)
            self._refusals.add(key, None, (token_id,))
            return None
        entry = make_entry(credential, read_at, now())
        if credential.agent_status is None:
            # The token is good and the agent nobody's: takes no room from callers who exist.
            self._cache.drop(key)
            self._refusals.add(key, entry, ids_of(credential))
        else:
            self._cache.put(key, entry)
            self._tell(entry)
        return entry

    def _tell(self, entry: Entry) -> None:
        credential = entry.credential
        self._share(encode_fill(credential, entry.read_at), key=credential.digest + credential.agent_id.bytes)

    def _void(self, kind: str, entity_id: UUID | None) -> None:
        if kind != "directive":
            self._voided.inc(self._cache.void(entity_id))
            self._refusals.forget(entity_id)


def read_bearer(authorization: str | None) -> str:
    """The token in an `Authorization` field; raises MissingToken or InvalidToken where there is none."""
    scheme, _, bearer = (authorization or "").strip().partition(" ")
    if not scheme:
        raise MissingToken
    if scheme.lower() != "bearer":
        raise InvalidToken
    bearer = bearer.strip()
    if not bearer:
        raise MissingToken
    return bearer


def _serves(entry: Entry, moment: float) -> bool:
    """Whether an entry may answer a request; an expired one is looked up, so that it takes the time of any other."""
    return not entry.is_void and moment < entry.expires_at


def _refuse(credential: Credential, needs: int, agent_header: str | None) -> NoReturn:
    fault = find_fault(credential, needs, agent_header)
    assert fault is not None, "an entry without a principal, or without the permissions, has a fault"  # noqa: S101
    raise fault


def _cannot_check() -> RequestError:
    return ServiceDegraded("The token cannot be checked just now. Try again shortly.", headers={"Retry-After": "1"})
