"""`ibexctl migrate`, and what commands say of stores that are wrong, away or empty."""

import pytest

from tests.ibexctl.conftest import run_apart

DEVELOPMENT_ORG = "00000000-0000-0000-0000-000000000001"


@pytest.mark.usefixtures("on_stores")
def test_both_stores_are_migrated_once(ibexctl) -> None:
    before = ibexctl("migrate", "status", "--json").data
    assert before["is_current"] is False
    assert {row["state"] for row in before["migrations"] if row["store"] == "clickhouse"} == {"pending"}
    applied = ibexctl("migrate", "up", "--json").data
    assert {row["store"] for row in applied["applied"]} == {"clickhouse"}
    assert applied["is_seeded"] is False
    assert ibexctl("migrate", "up", "--json").data["applied"] == []
    after = ibexctl("migrate", "status", "--json").data
    assert after["is_current"] is True
    assert {row["state"] for row in after["migrations"]} == {"applied"}


@pytest.mark.usefixtures("on_stores")
def test_one_step_down_and_up_again(ibexctl) -> None:
    ibexctl("migrate", "up")
    reverted = ibexctl("migrate", "down", "--json").data["reverted"]
    assert reverted["store"] == "postgres"
    pending = [row for row in ibexctl("migrate", "status", "--json").data["migrations"] if row["state"] == "pending"]
    assert [(row["store"], row["number"]) for row in pending] == [("postgres", reverted["number"])]
    shown = ibexctl("migrate", "status")
    assert "`ibexctl migrate up` applies what is pending." in shown.err
    assert [row["number"] for row in ibexctl("migrate", "up", "--json").data["applied"]] == [reverted["number"]]
    assert ibexctl("migrate", "down", "--store", "clickhouse", "--json").data["reverted"]["store"] == "clickhouse"


@pytest.mark.usefixtures("on_stores")
def test_the_seed_is_for_development_alone(ibexctl, environment) -> None:
    assert ibexctl("migrate", "up", "--seed", "--json").data["is_seeded"] is True
    assert ibexctl("org", "show", DEVELOPMENT_ORG, "--json").data["status"] == "active"
    environment.setenv("IBEX_ENV", "production")
    environment.setenv("OPENAI_API_KEY", "sk-none")
    refused = ibexctl("migrate", "up", "--seed", "--json").error
    assert "everybody knows" in refused["message"]


@pytest.mark.usefixtures("on_stores")
def test_a_schema_that_is_missing_is_named_with_its_command(ibexctl) -> None:
    ibexctl("org", "create", "acme")
    listed = ibexctl("trace", "list", "--json")
    assert listed.code == 1
    assert "migrate" in f"{listed.error['message']} {listed.error['hint']}"


def test_a_wrong_address_a_wrong_password_and_a_store_that_is_away(ibexctl, environment, on_stores) -> None:
    dsn = on_stores["IBEX_POSTGRES_ADMIN_DSN"]
    password = dsn.partition("ibex_owner:")[2].partition("@")[0]
    for wrong in ("postgresql://nobody:hush@127.0.0.1:1/ibex", dsn.replace(password, "hush"), "nonsense://hush"):
        environment.setenv("IBEX_POSTGRES_ADMIN_DSN", wrong)
        for words in (("org", "list"), ("migrate", "status")):
            refused = ibexctl(*words, "--json")
            assert refused.error["hint"], refused
            assert "Something unforeseen" not in refused.error["message"]
            assert "hush" not in refused.out + refused.err


def test_the_owner_is_needed_and_named(ibexctl, environment, on_stores) -> None:
    environment.delenv("IBEX_POSTGRES_ADMIN_DSN")
    for words in (("org", "list"), ("migrate", "status")):
        assert "IBEX_POSTGRES_ADMIN_DSN is not set" in ibexctl(*words, "--json").error["message"]


def test_a_change_holds_without_redis_and_says_so(ibexctl, environment, on_stores) -> None:
    environment.setenv("IBEX_REDIS_URL", "redis://127.0.0.1:1/0")
    made = ibexctl("org", "create", "acme", "--json")
    assert made.code == 0
    assert made.data["name"] == "acme"
    assert "warning: done, but Redis did not pass it on" in made.err
    assert len(ibexctl("org", "list", "--json").data["organizations"]) == 1


def test_a_wrong_setting_is_named_and_a_misspelt_one_reported(ibexctl, environment, on_stores) -> None:
    environment.setenv("IBEX_PORT", "eighty")
    assert "IBEX_PORT" in ibexctl("org", "list", "--json").error["message"]
    environment.delenv("IBEX_PORT")
    environment.setenv("IBEX_POTR", "80")
    listed = ibexctl("org", "list", "--json")
    assert listed.code == 0
    assert listed.data == {"organizations": []}
    assert listed.err.count("IBEX_POTR") == 1


def test_a_data_directory_that_cannot_be_written_is_named(ibexctl, environment, tmp_path) -> None:
    file = tmp_path / "file"
    file.write_text("not a directory")
    environment.setenv("IBEX_DATA_DIR", str(file / "data"))
    refused = ibexctl("org", "list", "--json").error
    assert str(file) in refused["message"]


def test_without_a_server_a_command_starts_what_it_needs_and_stops_it(environment, data_dir) -> None:
    created = run_apart("org", "create", "acme", "--json")
    assert created.code == 0, created.err
    assert created.data["name"] == "acme"
    listed = run_apart("org", "list", "--json")
    assert [row["name"] for row in listed.data["organizations"]] == ["acme"]
    assert not (data_dir / "run" / "engines.json").exists()
