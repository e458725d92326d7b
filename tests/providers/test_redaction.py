"""What a provider's text must not carry to a client."""

import json

import pytest

from ibex.providers.redaction import MAX_TEXT_BYTES, sanitise

KEY = "sk-proj-0123456789abcdef"
DIRECTIVE = 'Never mention "Project Ibis".\nAnswer in French, s\'il vous plaît.'


@pytest.mark.parametrize(
    "text",
    [
        f"Incorrect API key provided: {KEY}.",
        f"a {KEY[:9]}\0{KEY[9:]} b".replace("\0", "") + "\x00",
        f"messages[0]: {DIRECTIVE}",
        f"messages: {json.dumps([{'content': DIRECTIVE}])}",
        f"messages: {json.dumps([{'content': DIRECTIVE}], ensure_ascii=False)}",
        f"input: {[{'content': DIRECTIVE}]!r}",
        "the line «Answer in French, s'il vous plaît.» is not allowed",
        KEY * 200,
        "x" * 1020 + KEY,
    ],
)
def test_secrets_do_not_come_back(text: str) -> None:
    found = sanitise(text, (KEY, DIRECTIVE))
    for secret in (KEY, "Project Ibis", "French", KEY[:8]):
        assert secret not in found
    assert len(found.encode()) <= MAX_TEXT_BYTES


def test_controls_are_taken_out_before_secrets_are_looked_for() -> None:
    assert sanitise("a\x1b[31mb\u202ec\r\nd\x00") == "a [31mb c  d "
    assert "French" not in sanitise(f"{DIRECTIVE}\x07", (DIRECTIVE,))


def test_a_cut_does_not_split_a_character() -> None:
    assert sanitise("é" * 2000) == "é" * (MAX_TEXT_BYTES // 2)
    assert sanitise("x" + "é" * 2000) == "x" + "é" * (MAX_TEXT_BYTES // 2 - 1)


def test_ordinary_text_is_left_alone() -> None:
    text = "Invalid 'temperature': must be at most 2. 温度 🙂"
    assert sanitise(text, (KEY, DIRECTIVE, "")) == text
