"""`ibexctl token mint --as-token`: read from a file or standard input, never from the command line."""

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.usefixtures("on_stores")


@pytest.fixture
def minter(ibexctl, tmp_path: Path) -> SimpleNamespace:
    """A token that may mint, and the file it is in."""
    org_id = ibexctl("org", "create", "acme", "--json").data["org_id"]
    words = ("--permissions", "ProxyChatCompletion+TOKEN_CREATE", "--expires-in", "2h", "--json")
    token = ibexctl("token", "mint", "--org", org_id, *words).data
    file = tmp_path / "minter"
    file.write_text(token["token"] + "\n")
    return SimpleNamespace(org_id=org_id, token=token, file=file)


def test_a_token_mints_one_like_itself_and_the_audit_names_it(ibexctl, minter) -> None:
    made = ibexctl("token", "mint", "--as-token", minter.file, "--name", "child", "--json").data
    assert made["org_id"] == minter.org_id
    assert made["expires_at"] == minter.token["expires_at"]
    assert made["permission_names"] == ["MEMORY_READ", "SESSION_CREATE", "SESSION_READ"]
    (event, *_) = ibexctl("audit", "list", "--kind", "token", "--json").data["audit_events"]
    assert (event["actor"], event["action"]) == (minter.token["prefix"], "mint")


def test_it_is_read_from_standard_input_too(ibexctl, minter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(minter.file.read_bytes())))
    assert ibexctl("token", "mint", "--as-token", "-", "--org", "acme", "--json").data["org_id"] == minter.org_id


def test_a_terminal_asks_for_it_unseen(ibexctl, minter, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", terminal)
    monkeypatch.setattr("getpass.getpass", lambda _prompt: minter.token["token"])
    assert ibexctl("token", "mint", "--as-token", "-", "--json").data["org_id"] == minter.org_id


def test_a_token_on_the_command_line_is_refused_and_not_repeated(ibexctl, minter) -> None:
    refused = ibexctl("token", "mint", "--as-token", minter.token["token"])
    assert refused.code == 2
    assert "does not belong on a command line" in refused.err
    assert minter.token["token"] not in refused.err + refused.out


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--permissions", "Admin"), "it lacks MEMORY_WRITE"),
        (("--expires-in", "3h"), "outlives"),
        (("--agent", "00000000-0000-0000-0000-000000000009"), "There is no agent"),
        (("--org", "other"), "its own organization"),
    ],
)
def test_it_gives_nothing_that_it_has_not(ibexctl, minter, words: tuple[str, ...], why: str) -> None:
    ibexctl("org", "create", "other")
    before = ibexctl("token", "list", "--json").data
    assert why in ibexctl("token", "mint", "--as-token", minter.file, *words, "--json").error["message"]
    assert ibexctl("token", "list", "--json").data == before


def test_a_revoked_one_mints_nothing(ibexctl, minter) -> None:
    ibexctl("token", "revoke", minter.token["token_id"])
    refused = ibexctl("token", "mint", "--as-token", minter.file, "--json").error
    assert refused["message"] == "The token that is to mint is not valid."


def test_without_an_organization_and_a_minter_nobody_knows_whose_it_is(ibexctl) -> None:
    refused = ibexctl("token", "mint")
    assert refused.code == 2
    assert "--org" in refused.err


def test_what_a_leaked_token_minted_is_revoked_by_naming_it(ibexctl, minter) -> None:
    children = [ibexctl("token", "mint", "--as-token", minter.file, "--json").data for _ in range(2)]
    prefix = minter.token["prefix"]
    done = ibexctl("token", "revoke", "--minted-by", prefix)
    assert all(child["prefix"] in done.out for child in children)
    assert f"2 revoked that {prefix} had minted." in done.err
    assert f"ibexctl token revoke {prefix}" in done.err
    assert ibexctl("token", "revoke", prefix).code == 0
    again = ibexctl("token", "revoke", "--minted-by", prefix, "--json")
    assert again.data == {"minted_by": minter.token["token_id"], "tokens": []}
    assert ibexctl("token", "revoke", prefix, "--minted-by", prefix).code == 2
    assert ibexctl("token", "revoke", "--org", "acme", "--minted-by", prefix).code == 2
