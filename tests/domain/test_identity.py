"""Tokens: minted, parsed, digested, verified; and nothing but a canonical UUID is one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ibex.domain.identity import (
    DEV_TOKEN,
    DEV_TOKEN_ID,
    MAX_TOKEN_LENGTH,
    PERMISSION_SETS,
    Permission,
    digest_bearer,
    mint_token,
    parse_bearer,
    parse_uuid,
    permission_names,
    verify_digest,
)


def test_a_minted_token_round_trips() -> None:
    token = mint_token()

    assert parse_bearer(token.bearer) == token.token_id
    assert verify_digest(digest_bearer(token.bearer), token.digest)
    assert len(token.bearer) <= MAX_TOKEN_LENGTH
    assert token.bearer not in repr(token)


def test_one_changed_character_does_not_verify() -> None:
    token = mint_token()
    for position in (0, 20, len(token.bearer) - 1):
        forged = (
            token.bearer[:position] + ("x" if token.bearer[position] != "x" else "y") + token.bearer[position + 1 :]
        )

        assert not verify_digest(digest_bearer(forged), token.digest)


@given(st.text())
def test_junk_is_no_token(text: str) -> None:
    assert parse_bearer(text) is None
    assert len(digest_bearer(text.encode("utf-8", "surrogatepass").decode("utf-8", "replace"))) == 32


@pytest.mark.parametrize(
    "spoil", [str.upper, lambda t: t + "=", lambda t: t + "\n", lambda t: " " + t, lambda t: t[:-1]]
)
def test_a_spoilt_token_is_none(spoil) -> None:
    assert parse_bearer(spoil(mint_token().bearer)) is None


def test_the_development_token_has_its_own_id() -> None:
    assert parse_bearer(DEV_TOKEN) == DEV_TOKEN_ID


@pytest.mark.parametrize(
    "text",
    [
        "{6f6c2b1e-52a0-5c5e-9a43-1f0a3a6b8b52}",
        "urn:uuid:6f6c2b1e-52a0-5c5e-9a43-1f0a3a6b8b52",
        "6f6c2b1e52a05c5e9a431f0a3a6b8b52",
        "6f6c2b1e-52a0-5c5e-9a43-1f0a3a6b8b52 ",
        "6f6c2b1e-52a0-5c5e-9a43-1f0a3a6b8b5",
        "6f6c2b1e-52a0-5c5e-9a43-1f0a3a6b8b5２",
    ],
)
def test_only_a_canonical_uuid_is_a_uuid(text: str) -> None:
    assert parse_uuid(text) is None
    assert parse_uuid("6F6C2b1e-52a0-5c5e-9a43-1f0a3a6b8b52") is not None


def test_permission_bits_are_the_contracts() -> None:
    assert Permission.MEMORY_BULK_EXPORT == 1 << 3
    assert Permission.DIRECTIVE_REVOKE == 1 << 11
    assert Permission.SESSION_TERMINATE == 1 << 18
    assert Permission.TRACE_EXPORT == 1 << 25
    assert Permission.TOKEN_REVOKE == 1 << 37
    assert Permission.FEDERATION_SHARE == 1 << 48
    assert not PERMISSION_SETS["Admin"] >> 56
    assert permission_names(PERMISSION_SETS["ProxyChatCompletion"]) == ["MEMORY_READ", "SESSION_CREATE", "SESSION_READ"]
