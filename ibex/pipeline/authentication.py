"""Who is asking: a bearer token and an agent become a principal, from memory when this node knows them."""

import asyncio
from time import perf_counter
from typing import Protocol
from uuid import UUID

from ibex.domain.identity import (
    DEV_TOKEN,
    PROXY_CHAT,
    AgentId,
    Credential,
    OrgId,
    Permission,
    Principal,
    TokenId,
    digest_bearer,
    parse_bearer,
    parse_uuid,
    verify_digest,
)
from ibex.errors import (
    AgentNotAuthorized,
    AgentSuspended,
    InsufficientPermissions,
    InvalidToken,
    MissingAgentId,
    MissingToken,
    OrgSuspended,
    ServiceDegraded,
    StoreUnavailable,
    UserSuspended,
    ValidationFailed,
)
from ibex.pipeline.changes import ChangeFollower, now
from ibex.pipeline.principals import Entry, Key, PrincipalCache, decode_fill, encode_fill, ids_of
from ibex.pipeline.strangers import RefusedTokens, StrangerGate
from ibex.stores.identity import IdentityReader
from ibex.telemetry import Metrics

NO_AGENT = AgentId(UUID(int=0))
"""Stands for an agent header that is absent or no UUID: the token is still judged first."""
REREAD_BATCH = 500
FILL_ATTEMPTS = 3
LOOK_AGAIN_SECONDS = 1.0


class Share(Protocol):
    """Gives a payload to the node's other workers; a later one with the same key replaces it for those yet to start."""

    def __call__(self, payload: bytes, *, key: bytes | None = None) -> None: ...


def keep_to_oneself(payload: bytes, *, key: bytes | None = None) -> None:
    """What a process without neighbours shares."""


class Authenticator:
    """Turns what a request presents into a principal, or says why not.

    A hit costs no network. A fill that read its rows before one of them changed never lands after it: it is read again.
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
    ) -> None:
        self._reader = reader
        self._follower = follower
        self._metrics = metrics
        self._accepts_dev_token = accepts_dev_token
        self._share = share
        self._cache = PrincipalCache(cache_size, metrics)
        self._refused = RefusedTokens()
        self._gate = StrangerGate()
        self._fills: dict[Key, asyncio.Task[Credential | None]] = {}
        self._hits = metrics.auth_cache_hits_total.labels("lru")
        self._misses = metrics.auth_cache_misses_total.labels("lru")
        follower.listen(self._forget)

    async def authenticate(
        self, authorization: str | None, agent_header: str | None, address: str, *, needs: Permission = PROXY_CHAT
    ) -> Principal:
        """The principal behind `Authorization` and `X-IBEX-Agent-ID`. Judges the token first, then the agent."""
        began = perf_counter()
        bearer = read_bearer(authorization)
        agent_id = AgentId(parse_uuid(agent_header) or NO_AGENT) if agent_header else NO_AGENT
        entry, was_cached = await self._find(bearer, agent_id, address)
        principal = _judge(entry.credential, agent_header, agent_id, needs, was_cached=was_cached)
        self._metrics.auth_duration_seconds.observe(perf_counter() - began)
        return principal

    async def _find(self, bearer: str, agent_id: AgentId, address: str) -> tuple[Entry, bool]:
        key = (digest_bearer(bearer), agent_id)
        entry = self._cache.get(key)
        if entry is not None and not self._follower.is_current():
            await self._follower.ensure_current()
            entry = self._cache.get(key)
        if entry is not None and entry.is_expired:
            self._cache.drop(key)
            raise InvalidToken
        if entry is not None and (not entry.is_stale or self._follower.postgres_is_away):
            self._hits.inc()
            return entry, True
        self._misses.inc()
        if entry is None:
            return await self._look_up(bearer, key, address, is_known=False), False
        return await self._look_again(bearer, key, address)

    async def _look_again(self, bearer: str, key: Key, address: str) -> tuple[Entry, bool]:
        """Read a stale entry anew; when Postgres fails just then, a caller who is known goes on being served."""
        try:
            async with asyncio.timeout(LOOK_AGAIN_SECONDS):
                return await self._look_up(bearer, key, address, is_known=True), False
        except (ServiceDegraded, TimeoutError):
            await self._follower.ensure_current()
            known = self._cache.get(key)
            if known is None:
                raise ServiceDegraded("The token cannot be checked just now.", headers={"Retry-After": "1"}) from None
            return known, True

    async def _look_up(self, bearer: str, key: Key, address: str, *, is_known: bool) -> Entry:
        if key in self._refused:
            self._metrics.auth_cache_hits_total.labels("negative").inc()
            raise InvalidToken
        token_id = parse_bearer(bearer)
        if token_id is None or (bearer == DEV_TOKEN and not self._accepts_dev_token):
            raise InvalidToken
        if not is_known:
            self._metrics.auth_cache_misses_total.labels("negative").inc()
            await self._gate.enter(address)
        fill = self._fills.get(key)
        if fill is None:
            fill = asyncio.get_running_loop().create_task(self._fill(token_id, key), name="credential fill")
            self._fills[key] = fill
            fill.add_done_callback(lambda _: self._fills.pop(key, None))
        credential = await asyncio.shield(fill)
        if credential is None:
            raise InvalidToken
        return Entry(credential, now(), now())

    async def _fill(self, token_id: TokenId, key: Key) -> Credential | None:
        """Read a credential and remember the verdict; None for one that is not valid."""
        for _ in range(FILL_ATTEMPTS):
            began = now()
            try:
                credential = await self._reader.find_credential(token_id, key[1])
            except StoreUnavailable:
                raise ServiceDegraded("The token cannot be checked just now.", headers={"Retry-After": "1"}) from None
            ids = (token_id,) if credential is None else ids_of(credential)
            if not self._follower.changed_since(began, ids):
                return self._settle(key, token_id, credential, began)
        raise ServiceDegraded("The token keeps changing while it is read.", headers={"Retry-After": "1"})

    def _settle(self, key: Key, token_id: TokenId, credential: Credential | None, read_at: float) -> Credential | None:
        if credential is None or not _is_valid(credential, key[0]):
            self._refused.add(key, frozenset({token_id}))
            return None
        if credential.agent_status is None:
            return credential  # an agent of nobody's is refused each time, and takes no room from those who exist
        self._cache.put(key, credential, read_at, now())
        self._share(encode_fill(credential, read_at), key=key[0] + key[1].bytes)
        return credential

    def take_shared(self, payload: bytes) -> None:
        """Remember what another worker of this node has verified."""
        fill = decode_fill(payload)
        credential = fill.credential
        key = (credential.digest, credential.agent_id)
        if not self._follower.changed_since(fill.read_at, ids_of(credential)):
            self._cache.put(key, credential, fill.read_at, now())

    def _forget(self, kind: str, entity_id: UUID | None) -> None:
        if kind == "directive":
            return
        keys = self._cache.keys_resting_on(entity_id)
        for key in keys:
            self._cache.drop(key)
        self._refused.forget(entity_id)
        self._metrics.revocation_invalidate_total.inc(len(keys))

    async def reread_forever(self) -> None:
        """Read entries in use again before they are stale, in batches; while Postgres is away they stay as they are."""
        while True:
            await asyncio.sleep(2.0)
            due = list(self._cache.due_for_reread())
            for start in range(0, len(due), REREAD_BATCH):
                try:
                    await self._reread(due[start : start + REREAD_BATCH])
                except StoreUnavailable:
                    break

    async def _reread(self, due: list[tuple[Key, Entry]]) -> None:
        began = now()
        wanted = [(entry.credential.org_id, entry.credential.token_id, key[1]) for key, entry in due]
        found = await self._reader.find_credentials(wanted)
        for key, entry in due:
            credential = found.get((entry.credential.token_id, key[1]))
            if self._follower.changed_since(began, ids_of(entry.credential)):
                continue
            if credential is None or credential.agent_status is None or not _is_valid(credential, key[0]):
                self._cache.drop(key)
            else:
                self._cache.put(key, credential, began, entry.used_at)


def read_bearer(authorization: str | None) -> str:
    """The token in an `Authorization` field; raises MissingToken or InvalidToken where there is none."""
    if not authorization or not authorization.strip():
        raise MissingToken
    scheme, _, bearer = authorization.strip().partition(" ")
    if scheme.lower() != "bearer":
        raise MissingToken if not bearer else InvalidToken
    if not bearer.strip():
        raise MissingToken
    return bearer.strip()


def _is_valid(credential: Credential, digest: bytes) -> bool:
    is_alive = credential.expires_in is None or credential.expires_in > 0
    return verify_digest(digest, credential.digest) and not credential.is_revoked and is_alive


def _judge(
    credential: Credential, agent_header: str | None, agent_id: AgentId, needs: Permission, *, was_cached: bool
) -> Principal:
    """Everything but the token's own validity, in the contract's order."""
    if credential.org_status != "active":
        raise OrgSuspended
    if credential.user_status != "active":
        raise UserSuspended
    if credential.permissions & needs != needs:
        raise InsufficientPermissions
    if not agent_header:
        raise MissingAgentId
    if agent_id == NO_AGENT:
        raise ValidationFailed("`X-IBEX-Agent-ID` must be a UUID.", param="X-IBEX-Agent-ID")
    if credential.agent_status is None or credential.bound_agent_id not in {None, agent_id}:
        raise AgentNotAuthorized
    if credential.agent_status != "active":
        raise AgentSuspended
    return Principal(
        token_id=credential.token_id,
        org_id=OrgId(credential.org_id),
        user_id=credential.user_id,
        agent_id=agent_id,
        permissions=credential.permissions,
        org_rpm=credential.org_rpm,
        agent_rpm=credential.agent_rpm,
        was_cached=was_cached,
    )
