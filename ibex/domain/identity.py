"""Who is asking: organizations, agents, permissions, and the tokens that prove it."""

import hmac
import re
import secrets
from dataclasses import dataclass
from enum import IntFlag
from hashlib import sha256
from typing import NewType
from uuid import UUID, uuid4

OrgId = NewType("OrgId", UUID)
UserId = NewType("UserId", UUID)
AgentId = NewType("AgentId", UUID)
TokenId = NewType("TokenId", UUID)

DEV_ORG_ID = OrgId(UUID("00000000-0000-0000-0000-000000000001"))
DEV_USER_ID = UserId(UUID("00000000-0000-0000-0000-000000000002"))
DEV_AGENT_ID = AgentId(UUID("00000000-0000-0000-0000-000000000003"))
DEV_TOKEN_ID = TokenId(UUID("00000000-0000-0000-0000-000000000004"))
DEV_TOKEN = "ibex_dev_sk_LOCALDEVELOPMENTONLY"  # noqa: S105
"""The development seed's bearer: accepted only where IBEX_ENV is development, which listens on loopback only."""

MAX_TOKEN_LENGTH = 128
_TOKEN = re.compile(
    r"ibex_pat_([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})_[A-Za-z0-9_-]{43}", re.ASCII
)
_UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", re.ASCII)


class Permission(IntFlag):
    """What a token may do: a 64-bit bitmap; bits 56–63 are reserved and must be 0."""

    MEMORY_READ = 1 << 0
    MEMORY_WRITE = 1 << 1
    MEMORY_DELETE = 1 << 2
    MEMORY_BULK_EXPORT = 1 << 3
    DIRECTIVE_READ = 1 << 8
    DIRECTIVE_WRITE = 1 << 9
    DIRECTIVE_PROMOTE = 1 << 10
    DIRECTIVE_REVOKE = 1 << 11
    SESSION_CREATE = 1 << 16
    SESSION_READ = 1 << 17
    SESSION_TERMINATE = 1 << 18
    TRACE_READ = 1 << 24
    TRACE_EXPORT = 1 << 25
    USER_MANAGE = 1 << 32
    BILLING_READ = 1 << 33
    BILLING_MANAGE = 1 << 34
    ORG_SETTINGS_WRITE = 1 << 35
    TOKEN_CREATE = 1 << 36
    TOKEN_REVOKE = 1 << 37
    MARKETPLACE_PUBLISH = 1 << 40
    MARKETPLACE_INSTALL = 1 << 41
    FEDERATION_SHARE = 1 << 48


_P = Permission
PERMISSION_SETS: dict[str, Permission] = {
    "ProxyChatCompletion": _P.MEMORY_READ | _P.SESSION_CREATE | _P.SESSION_READ,
    "AgentDefault": _P.MEMORY_READ
    | _P.MEMORY_WRITE
    | _P.DIRECTIVE_READ
    | _P.SESSION_CREATE
    | _P.SESSION_READ
    | _P.TRACE_READ,
    "ReadOnly": _P.MEMORY_READ | _P.DIRECTIVE_READ | _P.SESSION_READ | _P.TRACE_READ,
    "Admin": Permission(sum(_P)),
}
"""The named sets that `token mint --permissions` takes."""

PROXY_CHAT = PERMISSION_SETS["ProxyChatCompletion"]


def permission_names(permissions: int) -> list[str]:
    """The names of the set bits, lowest first."""
    return [str(bit.name) for bit in Permission if permissions & bit]


@dataclass(frozen=True, slots=True)
class Token:
    """A token just minted: the only moment at which its plain text exists outside the caller's hands."""

    token_id: TokenId
    bearer: str
    digest: bytes

    def __repr__(self) -> str:
        return f"Token({self.token_id}, ***)"


def mint_token() -> Token:
    """Mint a token with 32 random bytes of secret."""
    token_id = TokenId(uuid4())
    bearer = f"ibex_pat_{token_id}_{secrets.token_urlsafe(32)}"
    return Token(token_id, bearer, digest_bearer(bearer))


def parse_bearer(bearer: str) -> TokenId | None:
    """The row's id in a well-formed bearer, else None. Nothing but this UUID ever reaches SQL.

    The development token has a fixed id; whether it is accepted here is the caller's to decide.
    """
    if bearer == DEV_TOKEN:
        return DEV_TOKEN_ID
    match = _TOKEN.fullmatch(bearer) if len(bearer) <= MAX_TOKEN_LENGTH else None
    return TokenId(UUID(match[1])) if match else None


def digest_bearer(bearer: str) -> bytes:
    """The SHA-256 of the whole bearer (32 bytes): what the database stores and the cache is keyed by."""
    return sha256(bearer.encode("utf-8", "surrogateescape")).digest()


def verify_digest(presented: bytes, stored: bytes) -> bool:
    """Compare two digests in constant time."""
    return hmac.compare_digest(presented, stored)


def parse_uuid(text: str) -> UUID | None:
    """A canonical UUID (8-4-4-4-12 hex), else None: no braces, no URN, no missing dashes."""
    return UUID(text) if _UUID.fullmatch(text) else None


@dataclass(frozen=True, slots=True)
class Credential:
    """A token and the agent it was presented with, as the database knows them at one moment.

    `agent_status` is None when the agent does not exist in the token's organization. `expires_in` counts seconds from
    the database's clock at the read; it is None for a token that never expires.
    """

    token_id: TokenId
    org_id: OrgId
    user_id: UserId
    digest: bytes
    permissions: Permission
    bound_agent_id: AgentId | None
    is_revoked: bool
    expires_in: float | None
    org_status: str
    user_status: str
    agent_id: AgentId
    agent_status: str | None
    org_rpm: int | None
    agent_rpm: int | None


@dataclass(frozen=True, slots=True)
class Principal:
    """A caller who has proved who it is: a token, acting for an agent of its organization."""

    token_id: TokenId
    org_id: OrgId
    user_id: UserId
    agent_id: AgentId
    permissions: Permission
    org_rpm: int | None
    """The organization's own limit, requests a minute; None: the default."""
    agent_rpm: int | None
    """The agent's limit, requests a minute; None: none."""
    was_cached: bool = False
