"""Turns as data: ids that sort, sessions everybody can name, payloads that round-trip."""

from uuid import UUID, uuid4

import pytest

from ibex.domain.identity import AgentId, OrgId
from ibex.domain.turns import Outcome, Turn, decode_turn, derive_session_id, encode_turn, is_external_id, mint_uuid7


def make_turn(**changes: object) -> Turn:
    facts: dict = {
        "turn_id": mint_uuid7(),
        "request_id": mint_uuid7(),
        "org_id": uuid4(),
        "agent_id": uuid4(),
        "external_id": "s",
        "outcome": Outcome.OK,
        "has_checkpoint": True,
        "is_complete": True,
        "is_streaming": False,
        "status_code": 200,
        "model": "m",
        "provider": "openai",
        "requested_at": 1,
        "started_at": 2,
        "completed_at": 3,
    }
    return Turn(**{**facts, **changes})


def test_turn_ids_are_version_7_and_distinct() -> None:
    ids = [mint_uuid7() for _ in range(10_000)]

    assert {(i.version, i.variant) for i in ids} == {(7, "specified in RFC 4122")}
    assert len(set(ids)) == len(ids)
    assert ids[0].int >> 80 <= ids[-1].int >> 80


def test_a_payload_round_trips() -> None:
    turn = make_turn(input_tokens=None, output_tokens=0, completion_sha256=b"\0" * 32, provider_ttfb_ms=1.5)

    assert decode_turn(encode_turn(turn)) == turn


@pytest.mark.parametrize("payload", [b"", b"\xff", b"\x80", b"\x93\x01\x02\x03", encode_turn(make_turn())[:-1]])
def test_what_is_no_turn_is_a_value_error(payload: bytes) -> None:
    with pytest.raises(ValueError, match="not a turn"):
        decode_turn(payload)


def test_a_session_is_named_by_its_three_parts() -> None:
    org, agent = OrgId(UUID(int=1)), AgentId(UUID(int=2))

    assert derive_session_id(org, agent, "a") == derive_session_id(org, agent, "a")
    assert derive_session_id(org, agent, "a").version == 5
    others = {derive_session_id(org, agent, "b"), derive_session_id(OrgId(agent), AgentId(org), "a")}
    assert derive_session_id(org, agent, "a") not in others


@pytest.mark.parametrize(("text", "is_valid"), [("a", True), ("A-Z.0_9:-", True), ("x" * 64, True), ("", False),
    ("x" * 65, False), ("a b", False), ("a\n", False), ("ä", False), ("٣", False)])  # fmt: skip
def test_an_external_id_is_checked(text: str, is_valid: bool) -> None:
    assert is_external_id(text) is is_valid
