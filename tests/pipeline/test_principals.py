"""What a worker remembers of its callers: bounded, indexed by what each rests on, and told to its neighbours."""

from dataclasses import replace
from math import inf
from uuid import UUID, uuid4

import pytest

from ibex.domain.identity import AgentId, Credential, OrgId, Permission, TokenId, UserId, mint_token
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
from ibex.pipeline.principals import (
    KNOWN_SECONDS,
    REREAD_SECONDS,
    Key,
    PrincipalCache,
    decode_fill,
    encode_fill,
    find_fault,
    is_valid,
    make_entry,
)
from ibex.telemetry import Metrics

ORG = OrgId(uuid4())


def make_credential(**changes: object) -> Credential:
    token = mint_token()
    credential = Credential(
        token_id=token.token_id,
        org_id=ORG,
        user_id=UserId(uuid4()),
        digest=token.digest,
        permissions=Permission(3),
        bound_agent_id=None,
        is_revoked=False,
        expires_in=None,
        org_status="active",
        user_status="active",
        agent_id=AgentId(uuid4()),
        agent_status="active",
        org_rpm=None,
        agent_rpm=None,
    )
    return replace(credential, **changes)  # type: ignore[arg-type]


def key_of(credential: Credential) -> Key:
    return (credential.digest, str(credential.agent_id))


def fill(cache: PrincipalCache, count: int) -> list[Credential]:
    credentials = [make_credential() for _ in range(count)]
    for number, credential in enumerate(credentials):
        cache.put(key_of(credential), make_entry(credential, float(number), float(number)))
    return credentials


def test_the_one_used_longest_ago_goes_for_want_of_room_and_leaves_nothing() -> None:
    cache = PrincipalCache(2, Metrics())
    first, second = fill(cache, 2)
    assert cache.get(key_of(first), 5.0) is not None
    (third,) = fill(cache, 1)

    assert cache.peek(key_of(second)) is None
    assert not cache.knows_bearer(second.digest)
    assert cache.peek(key_of(first)) is not None
    for credential in (first, third):
        cache.drop(key_of(credential))
        cache.drop(key_of(credential))
    assert not cache._keys
    assert not cache._entries


def test_a_change_voids_what_rests_on_it_once_and_nothing_else() -> None:
    cache = PrincipalCache(10, Metrics())
    first, second, third = fill(cache, 3)

    for entity_id in (first.token_id, first.agent_id, first.user_id):
        cache.void(entity_id)
    assert cache.void(first.token_id) == 0
    assert [cache.peek(key_of(one)).is_void for one in (first, second, third)] == [True, False, False]
    assert cache.knows_bearer(first.digest)
    assert cache.void(uuid4()) == 0
    assert cache.void(ORG) == 2
    assert cache.void(None) == 0


def test_a_new_read_follows_a_token_to_another_user() -> None:
    cache = PrincipalCache(10, Metrics())
    (credential,) = fill(cache, 1)
    moved = replace(credential, user_id=UserId(uuid4()))
    cache.put(key_of(credential), make_entry(moved, 2.0, 2.0))

    assert cache.void(credential.user_id) == 0
    assert cache.void(moved.user_id) == 1


def test_what_is_unused_for_long_is_forgotten_and_what_is_old_or_void_is_due() -> None:
    cache = PrincipalCache(10, Metrics())
    unused, old, fresh, void = fill(cache, 4)
    moment = KNOWN_SECONDS + 1.5
    for credential in (old, void):
        assert cache.get(key_of(credential), moment - 1) is not None
    cache.put(key_of(fresh), make_entry(fresh, moment - REREAD_SECONDS + 1, moment))
    cache.put(key_of(void), make_entry(void, moment, moment))
    cache.void(void.token_id)

    assert {entry.credential.token_id for _, entry in cache.due_for_reread(moment)} == {old.token_id, void.token_id}
    assert cache.peek(key_of(unused)) is None
    assert cache.get(key_of(old), moment + KNOWN_SECONDS) is None


@pytest.mark.parametrize(
    ("changes", "header", "fault"),
    [
        ({"org_status": "suspended", "user_status": "suspended"}, None, OrgSuspended),
        ({"user_status": "suspended", "permissions": Permission(0)}, None, UserSuspended),
        ({"permissions": Permission(1)}, None, InsufficientPermissions),
        ({}, None, MissingAgentId),
        ({}, "", MissingAgentId),
        ({}, "junk", ValidationFailed),
        ({"agent_status": None}, str(UUID(int=4)), AgentNotAuthorized),
        ({"bound_agent_id": AgentId(uuid4()), "agent_status": "paused"}, str(UUID(int=4)), AgentNotAuthorized),
        ({"agent_status": "archived"}, str(UUID(int=4)), AgentSuspended),
        ({}, str(UUID(int=5)), None),
    ],
)
def test_faults_come_in_the_contracts_order(
    changes: dict[str, object], header: str | None, fault: type[RequestError] | None
) -> None:
    found = find_fault(make_credential(**changes), 3, header)

    assert found is None if fault is None else type(found) is fault


def test_an_entry_amounts_to_a_principal_unless_it_is_refused_whatever_is_asked() -> None:
    credential = make_credential(expires_in=7.0, permissions=Permission(0))
    entry = make_entry(credential, 100.0, 101.0)
    assert entry.principal is not None
    assert (entry.principal.agent_id, entry.principal.was_cached) == (credential.agent_id, True)
    assert (entry.expires_at, entry.permissions, entry.is_void) == (107.0, 0, False)
    assert make_entry(make_credential(), 1.0, 1.0).expires_at == inf
    assert make_entry(replace(credential, agent_status="paused"), 1.0, 1.0).principal is None


def test_a_token_is_valid_with_its_own_digest_while_it_lives() -> None:
    credential = make_credential()
    assert is_valid(credential, credential.digest)
    assert is_valid(replace(credential, expires_in=0.1), credential.digest)
    assert not is_valid(credential, mint_token().digest)
    assert not is_valid(replace(credential, is_revoked=True), credential.digest)
    assert not is_valid(replace(credential, expires_in=0.0), credential.digest)
    assert not is_valid(replace(credential, expires_in=-5.0), credential.digest)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"expires_in": 3.5, "org_rpm": 7, "agent_rpm": 1, "agent_status": None, "bound_agent_id": AgentId(uuid4())},
        {"permissions": Permission(sum(Permission))},
        {"permissions": Permission(0)},
        {"permissions": Permission(1 << 5)},
        {"token_id": TokenId(UUID(int=4))},
    ],
)
def test_a_fill_arrives_as_it_was_sent(changes: dict[str, object]) -> None:
    credential = make_credential(**changes)
    fill = decode_fill(encode_fill(credential, 12.5))

    assert fill is not None
    assert (fill.credential, fill.read_at) == (credential, 12.5)
    assert isinstance(fill.credential.permissions, Permission)
