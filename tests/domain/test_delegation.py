"""What a token may pass on: never more than it has, whatever is wished."""

from datetime import timedelta
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ibex.domain.delegation import Minter, Wish, check_delegation
from ibex.domain.identity import PERMISSION_SETS, PROXY_CHAT, AgentId, OrgId, Permission, TokenId, UserId
from ibex.errors import OperatorError

OURS, THEIRS = UUID(int=1), UUID(int=2)
ADMIN = PERMISSION_SETS["Admin"]

permissions = st.integers(0, 2**64 - 1).map(lambda bits: Permission(bits & int(ADMIN)))
ids = st.sampled_from([None, OURS, THEIRS])
spans = st.none() | st.timedeltas(timedelta(seconds=1), timedelta(days=30))


def minter(granted: Permission = ADMIN, agent: UUID | None = None, expires_in: timedelta | None = None) -> Minter:
    agent_id = None if agent is None else AgentId(agent)
    return Minter(TokenId(OURS), OrgId(OURS), UserId(OURS), agent_id, granted, expires_in)


@given(permissions, permissions, ids, ids, ids, ids, spans, spans)
def test_nothing_is_passed_on_that_the_minter_has_not(had, wanted, org, user, bound, agent, life, span) -> None:
    wish = Wish(wanted, org, user, agent, span)
    try:
        check_delegation(minter(had, bound, life), wish)
    except OperatorError:
        return
    assert Permission.TOKEN_CREATE in had
    assert wanted & ~had == 0
    assert org in (None, OURS)
    assert user in (None, OURS)
    assert bound is None or agent in (None, bound)
    assert life is None or span is None or span <= life


@given(permissions, st.booleans(), spans)
def test_whatever_it_has_it_may_pass_on_if_it_may_mint(had: Permission, is_bound: bool, life: timedelta | None) -> None:
    bound = OURS if is_bound else None
    wish = Wish(had | Permission.TOKEN_CREATE, OrgId(OURS), UserId(OURS), AgentId(OURS), life)
    check_delegation(minter(had | Permission.TOKEN_CREATE, bound, life), wish)


@pytest.mark.parametrize(
    ("mints", "wish", "why"),
    [
        (minter(PROXY_CHAT), Wish(PROXY_CHAT), "no permission TOKEN_CREATE"),
        (minter(PROXY_CHAT | Permission.TOKEN_CREATE), Wish(ADMIN), "it lacks MEMORY_WRITE, MEMORY_DELETE"),
        (minter(), Wish(PROXY_CHAT, org_id=OrgId(THEIRS)), "its own organization"),
        (minter(), Wish(PROXY_CHAT, user_id=UserId(THEIRS)), "the user it belongs to"),
        (minter(agent=OURS), Wish(PROXY_CHAT, agent_id=AgentId(THEIRS)), "bound to an agent"),
        (minter(expires_in=timedelta(1)), Wish(PROXY_CHAT, expires_in=timedelta(2)), "outlives it"),
    ],
)
def test_a_refusal_says_why(mints: Minter, wish: Wish, why: str) -> None:
    with pytest.raises(OperatorError, match=why):
        check_delegation(mints, wish)
