"""`ibexctl org`, `agent`, `token`, `directive`, `audit`: shapes, effects, mistakes."""

import asyncio
import io
import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import asyncpg
import pytest

from ibex.domain.identity import digest_bearer

pytestmark = pytest.mark.usefixtures("on_stores")

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


@pytest.fixture
def org_id(ibexctl):
    return ibexctl("org", "create", "acme", "--json").data["org_id"]


@pytest.fixture
def agent_id(ibexctl, org_id):
    return ibexctl("agent", "register", "bot", "--org", org_id, "--json").data["agent_id"]


def test_an_organization_is_created_under_an_id(ibexctl) -> None:
    made = ibexctl("org", "create", "acme", "--json")
    assert made.code == 0
    assert made.err == ""
    assert UUID(made.data["org_id"])
    assert made.data["name"] == "acme"
    assert TIME.fullmatch(made.data["created_at"])


def test_people_read_fields_and_what_to_do_next(ibexctl) -> None:
    made = ibexctl("org", "create", "acme")
    assert re.match(r"org_id\t[0-9a-f-]{36}\nname\tacme\n", made.out)
    assert "Next: ibexctl agent register NAME --org " in made.err


def test_a_limit_belongs_to_an_organization_or_to_one_agent_of_it(ibexctl, org_id, agent_id) -> None:
    assert ibexctl("org", "limit", org_id, "--rpm", 600, "--json").data == {
        "org_id": org_id,
        "agent_id": None,
        "rpm": 600,
    }
    assert ibexctl("org", "limit", "acme", "--rpm", 5, "--agent", agent_id, "--json").data["agent_id"] == agent_id
    assert ibexctl("agent", "limit", agent_id, "--rpm", 6, "--json").data["rpm"] == 6
    assert ibexctl("org", "show", "acme", "--json").data["rpm"] == 600
    assert ibexctl("agent", "show", agent_id, "--json").data["rpm"] == 6


def test_an_organization_without_a_limit_of_its_own_shows_the_default(ibexctl, org_id, environment) -> None:
    environment.setenv("IBEX_RATE_LIMIT_RPM", "90")
    ibexctl("org", "create", "bolt")
    ibexctl("org", "limit", "bolt", "--rpm", 90)
    acme, bolt = ibexctl("org", "list", "--json").data["organizations"]
    assert [(org["rpm"], org["is_default_rpm"]) for org in (acme, bolt)] == [(90, True), (90, False)]
    cells = [line.split("\t")[3] for line in ibexctl("org", "list").out.splitlines()]
    assert cells == ["rpm", "90 (default)", "90"]
    assert "rpm\t90 (default)\n" in ibexctl("org", "show", "acme").out
    assert ibexctl("org", "show", "acme", "--json").data["is_default_rpm"] is True


def test_an_organization_is_named_by_its_name_while_that_is_unambiguous(ibexctl, org_id) -> None:
    assert ibexctl("agent", "register", "bot", "--org", "acme", "--json").data["org_id"] == org_id
    ibexctl("org", "create", "acme")
    refused = ibexctl("agent", "register", "bot", "--org", "acme", "--json").error
    assert refused["message"] == "Several organizations are called acme."
    assert "ibexctl org list" in refused["hint"]


def test_a_token_is_shown_once_and_kept_as_a_digest(ibexctl, org_id, agent_id, postgres_database) -> None:
    words = ("--agent", agent_id, "--expires-in", "30d", "--name", "ci", "--permissions", "ReadOnly", "--json")
    minted = ibexctl("token", "mint", "--org", org_id, *words).data
    assert minted["token"].startswith(f"{minted['prefix']}_")
    assert minted["prefix"] == f"ibex_pat_{minted['token_id']}"
    assert "TRACE_READ" in minted["permission_names"]
    expires_at = datetime.fromisoformat(minted["expires_at"])
    assert timedelta(days=29) < expires_at - datetime.now(UTC) < timedelta(days=31)
    digest = asyncio.run(_read_digest(postgres_database.admin_dsn, minted["token_id"]))
    assert digest == digest_bearer(minted["token"])

    secret = minted["token"].removeprefix(minted["prefix"])
    for words in (("token", "list", "--all"), ("token", "list", "--json"), ("audit", "list", "--json")):
        shown = ibexctl(*words)
        assert minted["token_id"] in shown.out
        assert secret not in shown.out + shown.err
        assert digest.hex() not in shown.out + shown.err


async def _read_digest(dsn: str, token_id: str) -> bytes:
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetchval("select digest from ibex_core.tokens where token_id = $1", token_id)
    finally:
        await connection.close()


def test_people_get_a_line_to_copy(ibexctl, org_id) -> None:
    shown = ibexctl("token", "mint", "--org", org_id)
    assert "permissions\tProxyChatCompletion\n" in shown.out
    assert re.search(r"^export IBEX_TOKEN=ibex_pat_[0-9a-f-]{36}_[\w-]{43}$", shown.out, flags=re.MULTILINE)
    assert "this once" in shown.err


def test_a_token_is_revoked_by_id_and_by_prefix_and_twice(ibexctl, org_id) -> None:
    tokens = [ibexctl("token", "mint", "--org", org_id, "--json").data for _ in range(2)]
    by_id = ibexctl("token", "revoke", tokens[0]["token_id"], "--json").data
    assert TIME.fullmatch(by_id["revoked_at"])
    assert ibexctl("token", "revoke", tokens[0]["prefix"], "--json").data["revoked_at"] == by_id["revoked_at"]
    assert ibexctl("token", "revoke", tokens[1]["prefix"], "--json").data["token_id"] == tokens[1]["token_id"]
    assert ibexctl("token", "list", "--org", "acme", "--json").data == {"tokens": []}
    assert len(ibexctl("token", "list", "--org", "acme", "--all", "--json").data["tokens"]) == 2


def test_all_tokens_of_an_agent_or_an_organization_are_revoked_at_once(ibexctl, org_id, agent_id) -> None:
    bound = ibexctl("token", "mint", "--org", org_id, "--agent", agent_id, "--json").data["token_id"]
    free = ibexctl("token", "mint", "--org", org_id, "--json").data["token_id"]
    revoked = ibexctl("token", "revoke", "--agent", agent_id, "--json").data["tokens"]
    assert [row["token_id"] for row in revoked] == [bound]
    revoked = ibexctl("token", "revoke", "--org", "acme", "--json").data["tokens"]
    assert [row["token_id"] for row in revoked] == [free]
    assert ibexctl("token", "revoke", "--json").code == 2
    assert ibexctl("token", "revoke", bound, "--org", "acme", "--json").code == 2


def test_a_user_is_created_and_a_token_can_be_theirs(ibexctl, org_id) -> None:
    made = ibexctl("user", "create", "Ada Lovelace", "--org", "acme")
    user_id = re.search(r"user_id\t(\S+)", made.out)[1]
    assert f"ibexctl token mint --org {org_id} --user {user_id}" in made.err
    names = [row["name"] for row in ibexctl("user", "list", "--org", "acme", "--json").data["users"]]
    assert names == ["Owner", "Ada Lovelace"]
    assert ibexctl("token", "mint", "--org", "acme", "--user", user_id, "--json").data["user_id"] == user_id


def test_a_rotated_token_has_a_successor_like_it_and_ends_after_its_grace(ibexctl, org_id, agent_id) -> None:
    words = ("--agent", agent_id, "--expires-in", "30d", "--name", "ci", "--permissions", "ReadOnly", "--json")
    old = ibexctl("token", "mint", "--org", org_id, *words).data
    new = ibexctl("token", "rotate", old["prefix"], "--grace", "2h", "--json").data
    assert new["token"].startswith(new["prefix"])
    assert new["token_id"] != old["token_id"]
    for name in ("org_id", "user_id", "agent_id", "name", "permissions", "permission_names"):
        assert new[name] == old[name]
    assert new["rotated"]["token_id"] == old["token_id"]
    now = datetime.now(UTC)
    ends_in = {row["token_id"]: datetime.fromisoformat(row["expires_at"]) - now for row in (new, new["rotated"])}
    assert timedelta(days=29) < ends_in[new["token_id"]] < timedelta(days=31)
    assert timedelta(hours=1) < ends_in[old["token_id"]] < timedelta(hours=3)
    listed = ibexctl("token", "list", "--org", "acme", "--json").data["tokens"]
    assert {row["token_id"] for row in listed} == {old["token_id"], new["token_id"]}


def test_a_grace_never_lengthens_a_life_and_without_an_end_the_successor_has_none(ibexctl, org_id) -> None:
    brief = ibexctl("token", "mint", "--org", org_id, "--expires-in", "1h", "--json").data
    assert ibexctl("token", "rotate", brief["prefix"], "--json").data["rotated"]["expires_at"] == brief["expires_at"]
    endless = ibexctl("token", "mint", "--org", org_id, "--json").data
    assert ibexctl("token", "rotate", endless["prefix"], "--json").data["expires_at"] is None
    shown = ibexctl("token", "rotate", endless["prefix"], "--expires-in", "1w")
    assert "export IBEX_TOKEN=ibex_pat_" in shown.out
    assert f"old token\t{endless['prefix']}\nvalid until\t" in shown.out


def test_a_token_that_is_revoked_or_unknown_cannot_be_rotated(ibexctl, org_id) -> None:
    token = ibexctl("token", "mint", "--org", org_id, "--json").data
    ibexctl("token", "revoke", token["prefix"])
    assert "nothing to rotate" in ibexctl("token", "rotate", token["prefix"], "--json").error["message"]
    assert f"There is no token {NOBODY}" in ibexctl("token", "rotate", NOBODY, "--json").error["message"]


def test_tokens_are_listed_with_their_permissions_by_name(ibexctl, org_id) -> None:
    ibexctl("token", "mint", "--org", org_id, "--permissions", "ReadOnly")
    ibexctl("token", "mint", "--org", org_id, "--permissions", "SESSION_CREATE+SESSION_READ")
    head, *rows = [line.split("\t") for line in ibexctl("token", "list").out.splitlines()]
    assert "last_used_at" in head
    assert [row[head.index("permissions")] for row in rows] == ["ReadOnly", "SESSION_CREATE, SESSION_READ"]


def test_a_status_is_changed_and_changed_back(ibexctl, org_id, agent_id) -> None:
    assert ibexctl("org", "suspend", "acme", "--json").data["status"] == "suspended"
    assert ibexctl("org", "resume", "acme", "--json").data["status"] == "active"
    for verb, status in {"pause": "paused", "suspend": "suspended", "archive": "archived", "resume": "active"}.items():
        assert ibexctl("agent", verb, agent_id, "--json").data["status"] == status
    [user] = ibexctl("user", "list", "--org", org_id, "--json").data["users"]
    assert ibexctl("user", "suspend", user["user_id"], "--json").data["status"] == "suspended"
    assert ibexctl("user", "resume", user["user_id"], "--json").data["status"] == "active"


def test_everything_is_listed_within_an_organization_or_at_all(ibexctl, org_id, agent_id) -> None:
    other = ibexctl("org", "create", "other", "--json").data["org_id"]
    ibexctl("agent", "register", "their bot", "--org", other)
    assert [row["name"] for row in ibexctl("org", "list", "--json").data["organizations"]] == ["acme", "other"]
    assert [row["agent_id"] for row in ibexctl("agent", "list", "--org", "acme", "--json").data["agents"]] == [agent_id]
    assert len(ibexctl("agent", "list", "--json").data["agents"]) == 2


def test_a_directive_has_versions_that_can_be_compared_and_rolled_back(ibexctl, agent_id) -> None:
    one = ibexctl("directive", "set", agent_id, "--text", "Be brief.\nBe kind.", "--json").data
    assert one == {"agent_id": agent_id, "version": 1, "mode": "system_first"}
    two = ibexctl("directive", "set", agent_id, "--text", "Be brief.\nBe exact.", "--mode", "user_prepend", "--json")
    assert two.data["version"] == 2
    assert ibexctl("directive", "show", agent_id, "--json").data["text"] == "Be brief.\nBe exact."
    assert "-Be kind.\n+Be exact." in ibexctl("directive", "diff", agent_id, "--from", 1).out
    assert ibexctl("directive", "rollback", agent_id, "--version", 1, "--json").data["version"] == 1
    history = ibexctl("directive", "history", agent_id, "--json").data["versions"]
    assert [(row["version"], row["is_in_force"]) for row in history] == [(1, True), (2, False)]
    assert ibexctl("directive", "clear", agent_id, "--json").data["version"] is None
    assert "no directive in force" in ibexctl("directive", "show", agent_id, "--json").error["message"]
    assert ibexctl("directive", "set", agent_id, "--text", "Again.", "--json").data["version"] == 3


def test_a_directive_comes_from_a_file_or_from_standard_input(
    ibexctl, agent_id, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "directive.txt"
    path.write_text("Aus einer Datei: ü.\n", encoding="utf-8")
    ibexctl("directive", "set", agent_id, "--file", path)
    assert ibexctl("directive", "show", agent_id, "--json").data["text"] == "Aus einer Datei: ü."
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Piped.\nTwo lines.\n")))
    assert ibexctl("directive", "set", agent_id).code == 0
    assert ibexctl("directive", "show", agent_id, "--json").data["text"] == "Piped.\nTwo lines."


@pytest.mark.parametrize(
    ("text", "message"),
    [(" \n", "is empty"), ("x" * 32_769, "32,769 bytes; at most 32,768"), ("a\0b", "NUL character")],
)
def test_a_text_that_is_no_directive_is_refused(ibexctl, agent_id, text: str, message: str) -> None:
    assert message in ibexctl("directive", "set", agent_id, "--text", text, "--json").error["message"]


def test_each_change_leaves_an_audit_event(ibexctl, org_id, agent_id) -> None:
    ibexctl("org", "limit", org_id, "--rpm", 7)
    token_id = ibexctl("token", "mint", "--org", org_id, "--json").data["token_id"]
    ibexctl("token", "revoke", token_id)
    ibexctl("directive", "set", agent_id, "--text", "A secret instruction.")
    listed = ibexctl("audit", "list", "--org", "acme", "--json")
    events = listed.data["audit_events"]
    assert [(event["action"], event["entity_kind"]) for event in reversed(events)] == [
        ("create", "organization"),
        ("register", "agent"),
        ("set_limit", "limit"),
        ("mint", "token"),
        ("revoke", "token"),
        ("set", "directive"),
    ]
    assert "secret instruction" not in listed.out
    of_tokens = ibexctl("audit", "list", "--kind", "token", "--json").data["audit_events"]
    assert [event["action"] for event in of_tokens] == ["revoke", "mint"]
    assert len(ibexctl("audit", "list", "--limit", 2, "--json").data["audit_events"]) == 2


NOBODY = UUID("019b0000-0000-7000-8000-00000000dead")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("org", "show", "nowhere"), "There is no organization nowhere."),
        (("org", "show", NOBODY), f"There is no organization {NOBODY}."),
        (("org", "limit", "nowhere", "--rpm", 1), "There is no organization nowhere."),
        (("org", "create", ""), "A name is 1 to 200 printable characters."),
        (("org", "limit", "acme", "--rpm", 1, "--agent", NOBODY), f"There is no agent {NOBODY} in organization"),
        (("agent", "register", "bot", "--org", "nowhere"), "There is no organization nowhere."),
        (("user", "create", "Ada", "--org", "nowhere"), "There is no organization nowhere."),
        (("user", "create", "a\nb", "--org", "acme"), "A name is 1 to 200 printable characters."),
        (("token", "mint", "--org", "acme", "--user", NOBODY), f"There is no user {NOBODY} in organization"),
        (("agent", "pause", NOBODY), f"There is no agent {NOBODY}."),
        (("agent", "limit", NOBODY, "--rpm", 1), f"There is no agent {NOBODY}."),
        (("token", "mint", "--org", "nowhere"), "There is no organization nowhere."),
        (("token", "revoke", NOBODY), f"There is no token {NOBODY}."),
        (("token", "revoke", "--agent", NOBODY), f"There is no agent {NOBODY}."),
        (("directive", "set", NOBODY, "--text", "x"), f"There is no agent {NOBODY}."),
        (("directive", "rollback", NOBODY, "--version", 1), f"There is no agent {NOBODY}."),
        (("directive", "set", NOBODY, "--file", "absent.txt"), "absent.txt cannot be read: No such file or directory."),
    ],
)
def test_what_does_not_exist_is_said_and_changes_nothing(ibexctl, org_id, words, message: str) -> None:
    refused = ibexctl(*words, "--json")
    assert message in refused.error["message"]
    assert refused.err == ""
    assert len(ibexctl("audit", "list", "--json").data["audit_events"]) == 1
