"""What a token may pass on to a token that it mints: nothing that it does not have itself."""

from dataclasses import dataclass
from datetime import timedelta

from ibex.domain.identity import AgentId, OrgId, Permission, TokenId, UserId, permission_names
from ibex.errors import OperatorError


@dataclass(frozen=True, slots=True)
class Minter:
    """A valid token that mints another. `expires_in` is None for one that never expires."""

    token_id: TokenId
    org_id: OrgId
    user_id: UserId
    agent_id: AgentId | None
    permissions: Permission
    expires_in: timedelta | None


@dataclass(frozen=True, slots=True)
class Wish:
    """What the new token is to be; None: as its minter is."""

    permissions: Permission
    org_id: OrgId | None = None
    user_id: UserId | None = None
    agent_id: AgentId | None = None
    expires_in: timedelta | None = None


def check_delegation(minter: Minter, wish: Wish) -> None:
    """Raise OperatorError, which says why, unless the minter may pass on all that is wished."""
    if Permission.TOKEN_CREATE not in minter.permissions:
        raise OperatorError(
            "This token may not mint: it has no permission TOKEN_CREATE.",
            hint="Mint as the operator, without --as-token, or by a token of the set Admin.",
        )
    excess = wish.permissions & ~minter.permissions
    if excess:
        raise OperatorError(
            f"A token passes on no more than it has: it lacks {', '.join(permission_names(excess))}.",
            hint="Ask by --permissions for some of what it has.",
        )
    if wish.org_id not in (None, minter.org_id):
        raise OperatorError("A token mints for its own organization alone.", hint="Leave --org away.")
    if wish.user_id not in (None, minter.user_id):
        raise OperatorError("A token mints for the user it belongs to alone.", hint="Leave --user away.")
    if minter.agent_id is not None and wish.agent_id not in (None, minter.agent_id):
        raise OperatorError("A token that is bound to an agent mints for that agent alone.", hint="Leave --agent away.")
    if minter.expires_in is not None and wish.expires_in is not None and wish.expires_in > minter.expires_in:
        raise OperatorError(
            "A token mints none that outlives it.", hint="Leave --expires-in away: then both expire together."
        )
