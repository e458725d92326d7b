"""Reading what people write: durations, ids, permission sets, texts."""

import io
import sys
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import pytest
import typer

from ibex.domain.identity import DEV_TOKEN, PERMISSION_SETS, PROXY_CHAT, Permission, mint_token
from ibex.errors import OperatorError
from ibexctl import arguments


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("90s", timedelta(seconds=90)),
        ("30m", timedelta(minutes=30)),
        ("24h", timedelta(hours=24)),
        ("30d", timedelta(days=30)),
        ("2W", timedelta(weeks=2)),
        ("1h30m", timedelta(minutes=90)),
        ("36500d", timedelta(days=36_500)),
    ],
)
def test_a_duration_is_a_number_and_a_unit(text: str, span: timedelta) -> None:
    assert arguments.duration(text) == span


@pytest.mark.parametrize("text", ["", "30", "d", "-1d", "0s", "1.5h", "30 d", "1y", "36501d", "999999999w", "٣d"])
def test_anything_else_is_no_duration(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        arguments.duration(text)


def test_an_id_is_a_canonical_uuid() -> None:
    assert arguments.identifier(" 00000000-0000-0000-0000-000000000003 ") == UUID(int=3)
    for text in ("acme", "{00000000-0000-0000-0000-000000000003}", "00000000000000000000000000000003", ""):
        with pytest.raises(typer.BadParameter, match="Ids look like"):
            arguments.identifier(text)


def test_a_token_is_named_by_its_id_its_prefix_or_itself() -> None:
    token = mint_token()
    for text in (str(token.token_id), f"ibex_pat_{token.token_id}", token.bearer):
        assert arguments.token_identifier(text) == token.token_id
    assert arguments.token_identifier(DEV_TOKEN) == UUID(int=4)


def test_what_names_no_token_is_not_quoted_for_it_may_be_a_secret() -> None:
    with pytest.raises(typer.BadParameter) as caught:
        arguments.token_identifier("ibex_pat_almost-a-secret")
    assert "almost-a-secret" not in caught.value.format_message()


def test_permissions_are_sets_and_bits_joined_by_plus() -> None:
    assert arguments.permissions("ProxyChatCompletion") == PROXY_CHAT
    assert arguments.permissions("readonly+session_create") == PERMISSION_SETS["ReadOnly"] | Permission.SESSION_CREATE
    assert arguments.set_name(PROXY_CHAT) == "ProxyChatCompletion"
    assert arguments.set_name(Permission.SESSION_CREATE) is None
    with pytest.raises(typer.BadParameter, match="AgentDefault"):
        arguments.permissions("Everything")


class _Stdin:
    def __init__(self, raw: bytes, is_terminal: bool = False) -> None:
        self.buffer = io.BytesIO(raw)
        self.isatty = lambda: is_terminal


def test_a_text_comes_from_the_argument_a_file_or_standard_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "directive.txt"
    path.write_bytes("Grüß dich.\n".encode())
    assert arguments.read_text("given\n", None) == "given\n"
    assert arguments.read_text(None, path) == "Grüß dich."
    monkeypatch.setattr(sys, "stdin", _Stdin(b"\xef\xbb\xbfpiped\r\n\r\n"))
    assert arguments.read_text(None, Path("-")) == "piped\r\n"


def test_no_text_and_two_texts_are_wrong_usage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(typer.BadParameter, match="not both"):
        arguments.read_text("a", tmp_path)
    monkeypatch.setattr(sys, "stdin", _Stdin(b"", is_terminal=True))
    with pytest.raises(typer.BadParameter, match="pipe it in"):
        arguments.read_text(None, None)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match=r"absent\.txt cannot be read: No such file"):
        arguments.read_text(None, tmp_path / "absent.txt")
    binary = tmp_path / "binary"
    binary.write_bytes(b"ok\xff")
    with pytest.raises(OperatorError, match="not valid UTF-8 at byte 2"):
        arguments.read_text(None, binary)
