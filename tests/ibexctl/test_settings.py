"""`ibexctl config`: what is set and where it came from, and whether ibex could serve with it."""

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import redis

from ibex.sandbox import Sandbox
from ibex.stores.postgres.roles import RoleRights
from ibex.stores.probes import PostgresFacts
from ibexctl.checks import _judge_clock
from tests.conftest import run_clickhouse
from tests.ibexctl.conftest import Outcome, Run

KEY = "sk-canary-0123456789"


def settings_of(shown: Outcome) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in shown.data["settings"]}


def test_every_setting_is_shown_with_its_origin(ibexctl: Run, environment, tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text("IBEX_WORKERS=3\n")
    environment.setenv("IBEX_ENV_FILE", str(file))
    environment.setenv("IBEX_OPENAI_MODELS", "gpt-*,o1")
    shown = ibexctl("config", "show", "--json")
    found = settings_of(shown)
    assert shown.data["settings_file"] == str(file)
    assert (found["IBEX_WORKERS"]["value"], found["IBEX_PORT"]["value"]) == (3, 8080)
    assert found["IBEX_WORKERS"]["origin"] == {"source": "settings file", "name": "IBEX_WORKERS"}
    assert found["IBEX_PORT"]["origin"] == {"source": "default", "name": None}
    lines = ibexctl("config", "show", "--origin").out.splitlines()
    assert f"IBEX_WORKERS\t3\t{file} (IBEX_WORKERS)" in lines
    assert "IBEX_OPENAI_MODELS\tgpt-*,o1\tenvironment (IBEX_OPENAI_MODELS)" in lines
    assert "IBEX_CAPTURE_CONTENT\tfalse\tdefault" in lines
    assert "IBEX_PORT\t8080" in ibexctl("config", "show").out.splitlines()


def test_secrets_are_masked_and_addresses_shown_without_theirs(ibexctl: Run, environment) -> None:
    environment.setenv("OPENAI_API_KEY", KEY)
    environment.setenv("IBEX_REDIS_URL", f"rediss://user:{KEY}@cache.internal:6380/2?password={KEY}")
    environment.setenv("IBEX_POSTGRES_DSN", f"postgresql://ibex_app:1/2{KEY}@db.internal/ibex")
    environment.setenv("OPENAI_BASE_URL", f"https://user:{KEY}@models.internal/v1")
    for shown in (ibexctl("config", "show", "--json"), ibexctl("config", "show", "--origin")):
        assert shown.code == 0
        assert KEY not in shown.out + shown.err
        assert "OPENAI_API_KEY" in shown.out
    found = settings_of(ibexctl("config", "show", "--json"))
    assert found["IBEX_OPENAI_API_KEY"]["value"] == "**********"
    assert found["IBEX_REDIS_URL"]["value"] == "rediss://cache.internal:6380/2"
    assert found["IBEX_POSTGRES_DSN"]["value"] == "as configured"
    assert found["IBEX_OPENAI_BASE_URL"]["value"] == "https://models.internal/v1"


def findings_of(checked: Outcome) -> dict[str, dict[str, Any]]:
    return {finding["name"]: finding for finding in checked.data["findings"]}


def test_without_a_server_embedded_stores_are_said_to_be_such(ibexctl: Run, data_dir: Path) -> None:
    checked = ibexctl("config", "check", "--json")
    assert checked.code == 0
    assert {finding["result"] for finding in findings_of(checked).values()} == {"ok"}
    assert "embedded" in findings_of(checked)["postgres"]["detail"]
    assert list(data_dir.iterdir()) == []


def test_unknown_names_are_a_warning(ibexctl: Run, environment) -> None:
    environment.setenv("IBEX_PROT", "1")
    checked = ibexctl("config", "check")
    assert checked.code == 0
    assert "settings\twarn\tmean nothing: IBEX_PROT\n" in checked.out
    assert " hint (settings): " in checked.err


def test_real_stores_pass_once_they_are_migrated(ibexctl: Run, on_stores: Mapping[str, str]) -> None:
    checked = ibexctl("config", "check", "--json")
    assert checked.code == 1
    assert findings_of(checked)["clickhouse schema"]["result"] == "fail"
    assert "migrate up" in findings_of(checked)["clickhouse schema"]["hint"]

    assert ibexctl("migrate", "up").code == 0
    checked = ibexctl("config", "check", "--json")
    assert checked.code == 0, checked
    assert {finding["result"] for finding in checked.data["findings"]} == {"ok"}
    assert "ibex_app" in findings_of(checked)["postgres role"]["detail"]
    for dsn in on_stores.values():
        assert dsn not in checked.out


@pytest.fixture
def forgetful_redis(redis_url: str) -> Iterator[None]:
    """A Redis that evicts, until the test's end."""
    with closing(redis.from_url(redis_url)) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            yield
        finally:
            client.config_set("maxmemory-policy", "noeviction")


@pytest.mark.usefixtures("forgetful_redis")
def test_what_would_be_unsafe_fails_outside_development_and_warns_within(
    ibexctl: Run, environment, on_stores: Mapping[str, str], postgres_database
) -> None:
    ibexctl("migrate", "up")
    run_clickhouse(
        on_stores["IBEX_CLICKHOUSE_DSN"],
        "alter table llm_traces modify setting non_replicated_deduplication_window = 0",
    )
    environment.setenv("IBEX_POSTGRES_DSN", postgres_database.superuser_dsn)
    checked = findings_of(ibexctl("config", "check", "--json"))
    assert {name: one["result"] for name, one in checked.items() if one["result"] != "ok"} == {
        "postgres role": "warn",
        "redis eviction": "warn",
        "deduplication": "fail",
    }
    environment.setenv("IBEX_ENV", "production")
    environment.setenv("OPENAI_API_KEY", KEY)
    environment.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    outcome = ibexctl("config", "check", "--json")
    assert outcome.code == 1
    checked = findings_of(outcome)
    failed = {name for name, one in checked.items() if one["result"] == "fail"}
    assert failed == {"postgres role", "redis eviction", "deduplication", "provider"}
    assert all(checked[name]["hint"] for name in failed)
    assert KEY not in outcome.out + outcome.err


def test_stores_that_cannot_be_reached_are_named_by_their_setting(ibexctl: Run, environment, on_stores) -> None:
    dsn = on_stores["IBEX_POSTGRES_DSN"]
    password = dsn.partition("ibex_app:")[2].partition("@")[0]
    environment.setenv("IBEX_POSTGRES_DSN", dsn.replace(password, "hush"))
    environment.setenv("IBEX_POSTGRES_ADMIN_DSN", dsn)
    environment.setenv("IBEX_REDIS_URL", "redis://127.0.0.1:1/0")
    environment.setenv("IBEX_CLICKHOUSE_DSN", "http://127.0.0.1:1/ibex")
    outcome = ibexctl("config", "check", "--json")
    assert outcome.code == 1
    checked = findings_of(outcome)
    assert "refused the log-in" in checked["postgres"]["detail"]
    assert "does not own" in checked["postgres owner"]["detail"]
    for name, setting in {
        "postgres": "IBEX_POSTGRES_DSN",
        "postgres owner": "IBEX_POSTGRES_ADMIN_DSN",
        "redis": "IBEX_REDIS_URL",
        "clickhouse": "IBEX_CLICKHOUSE_DSN",
    }.items():
        assert checked[name]["result"] == "fail"
        assert setting in checked[name]["hint"]
    assert "hush" not in outcome.out


async def test_the_provider_is_asked_for_its_models(ibexctl: Run, environment) -> None:
    environment.setenv("IBEX_LLM_MODE", "live")
    async with Sandbox.serve() as sandbox:
        environment.setenv("OPENAI_BASE_URL", sandbox.base_url)
        checked = await asyncio.to_thread(ibexctl, "config", "check", "--json")
    found = findings_of(checked)["provider"]
    assert found["result"] == "ok"
    assert sandbox.base_url in found["detail"]
    gone = findings_of(await asyncio.to_thread(ibexctl, "config", "check", "--json"))["provider"]
    assert (gone["result"], "OPENAI_BASE_URL" in gone["hint"]) == ("fail", True)
    environment.delenv("OPENAI_BASE_URL")
    none = findings_of(await asyncio.to_thread(ibexctl, "config", "check", "--json"))["provider"]
    assert (none["result"], "501" in none["detail"]) == ("warn", True)


@pytest.mark.parametrize(
    ("skew", "result", "detail"),
    [(0.4, "ok", "agree"), (-2.0, "warn", "2.0 s behind"), (90.0, "fail", "90.0 s ahead of")],
)
def test_clocks_that_differ_are_told(skew: float, result: str, detail: str) -> None:
    rights = RoleRights("ibex_app", is_superuser=False, bypasses_row_security=False, is_owner=False)
    finding = _judge_clock(PostgresFacts("18", "ibex", rights, clock_skew=skew, clock_error=0.01))
    assert finding.result == result
    assert detail in finding.detail
