"""Settings: where they come from, what is refused, what children see, and that secrets stay masked."""

import os
import sys
from pathlib import Path

import pytest

from ibex.config import (
    EMBEDDED,
    Origin,
    Secret,
    Settings,
    child_environment,
    environment_names,
    find_origins,
    is_secret,
    load_settings,
    reach_loopback_directly,
    unknown_names,
)
from ibex.errors import ConfigurationError

NO_FILE = {"IBEX_ENV_FILE": os.devnull}
KEY = "sk-canary-0123456789"


def test_everything_has_a_default() -> None:
    settings = load_settings(NO_FILE)

    assert settings.is_development
    assert settings.postgres_dsn.get_secret_value() == EMBEDDED
    assert settings.resolved_llm_mode == "sandbox"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("IBEX_CHECKPOINT_RETENTION", "10000000000"),
        ("IBEX_SESSION_IDLE_MINUTES", "1e20"),
        ("IBEX_SHUTDOWN_DELAY", "inf"),
        ("IBEX_WATCHDOG_SECONDS", "1"),
        ("IBEX_WATCHDOG_SECONDS", "-1"),
    ],
)
def test_a_span_that_would_break_what_lives_by_it_is_refused(name: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name}: (Input should be less than or equal to|write 5 or more)"):
        load_settings({**NO_FILE, name: value})


@pytest.mark.parametrize("seconds", ["0", "5"])
def test_a_watchdog_is_off_or_patient(seconds: str) -> None:
    assert load_settings({**NO_FILE, "IBEX_WATCHDOG_SECONDS": seconds}).watchdog_seconds == float(seconds)


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text("IBEX_PORT=1\nIBEX_WORKERS=3\nIBEX_HOST=localhost\n")
    environ = {"IBEX_ENV_FILE": str(file), "IBEX_PORT": "2", "IBEX_WORKERS": "4"}

    settings = load_settings(environ, port=5, workers=None)

    assert (settings.port, settings.workers, settings.host) == (5, 4, "localhost")


def test_usual_names_are_accepted_and_ibexs_own_come_first() -> None:
    assert load_settings({**NO_FILE, "OPENAI_API_KEY": KEY}).openai_api_key == Secret(KEY)
    both = load_settings({**NO_FILE, "OPENAI_BASE_URL": "http://usual", "IBEX_OPENAI_BASE_URL": "http://own"})
    assert both.openai_base_url == "http://own"


def test_the_environment_wins_over_the_file_whatever_the_name(tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text("IBEX_OPENAI_BASE_URL=http://file\nIBEX_PORT=1\n")
    environ = {"IBEX_ENV_FILE": str(file), "OPENAI_BASE_URL": "http://environment", "IBEX_PORT": ""}

    settings = load_settings(environ)

    assert settings.openai_base_url == "http://environment"
    assert settings.port == Settings().port, "a variable that is empty hides the file's"


def test_each_value_can_say_where_it_came_from(tmp_path: Path) -> None:
    file, key = tmp_path / "env", tmp_path / "key"
    file.write_text("IBEX_PORT=1\nIBEX_WORKERS=3\n")
    key.write_text(KEY)
    environ = {"IBEX_ENV_FILE": str(file), "REDIS_URL": "redis://r", "OPENAI_API_KEY_FILE": str(key)}

    origins = find_origins(environ, port=5, host=None)

    assert origins.keys() == Settings.model_fields.keys()
    assert origins["port"] == Origin("flag")
    assert origins["workers"] == Origin("settings file", "IBEX_WORKERS")
    assert origins["redis_url"] == Origin("environment", "REDIS_URL")
    assert origins["openai_api_key"] == Origin("environment", "OPENAI_API_KEY_FILE")
    assert origins["host"] == Origin("default")


def test_a_settings_file_that_is_named_must_be_there_and_legible(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="does not exist"):
        load_settings({"IBEX_ENV_FILE": str(tmp_path / "absent")})
    (tmp_path / "latin").write_bytes(b"IBEX_HOST=\xe4\n")
    with pytest.raises(ConfigurationError, match="not UTF-8"):
        load_settings({"IBEX_ENV_FILE": str(tmp_path / "latin")})
    with pytest.raises(ConfigurationError, match="OPENAI_API_KEY_FILE names a file that cannot be read: it is not"):
        load_settings({**NO_FILE, "OPENAI_API_KEY_FILE": str(tmp_path / "latin")})


def test_a_secret_can_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"{KEY}\n")

    settings = load_settings({**NO_FILE, "OPENAI_API_KEY_FILE": str(tmp_path / "key")})

    assert settings.openai_api_key == Secret(KEY)
    assert settings.resolved_llm_mode == "live"


def test_a_secret_file_that_cannot_be_read_is_named() -> None:
    with pytest.raises(ConfigurationError, match="OPENAI_API_KEY_FILE"):
        load_settings({**NO_FILE, "OPENAI_API_KEY_FILE": "/nowhere/key"})


def test_a_secret_shows_itself_nowhere() -> None:
    settings = load_settings({**NO_FILE, "OPENAI_API_KEY": KEY})

    shown = (
        f"{settings} {settings!r} {settings.openai_api_key} {settings.openai_api_key:>40} {settings.model_dump_json()}"
    )

    assert KEY not in shown


PRODUCTION = {"IBEX_ENV": "production", "OPENAI_API_KEY": KEY}


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({"IBEX_PORT": "many", "IBEX_WORKERS": "0"}, ["IBEX_PORT", "IBEX_WORKERS"]),
        ({"IBEX_HOST": "0.0.0.0"}, ["IBEX_HOST"]),
        ({"IBEX_ENV": "production"}, ["IBEX_LLM_MODE"]),
        ({"IBEX_ENV": "test"}, ["IBEX_ENV"]),
        ({**PRODUCTION, "IBEX_HOST": "0.0.0.0"}, ["IBEX_HOST=0.0.0.0", "IBEX_ALLOW_PUBLIC_BIND=true"]),
        ({**PRODUCTION, "IBEX_HOST": "ibex.internal"}, ["IBEX_HOST=ibex.internal"]),
        ({**PRODUCTION, "IBEX_METRICS_HOST": "::"}, ["IBEX_METRICS_HOST=::", "IBEX_ALLOW_PUBLIC_BIND=true"]),
        ({**PRODUCTION, "IBEX_LLM_MODE": "sandbox"}, ["IBEX_LLM_MODE", "OPENAI_API_KEY"]),
        ({"IBEX_ENV": "staging", "IBEX_HOST": "10.0.0.1"}, ["IBEX_HOST", "IBEX_LLM_MODE"]),
        ({"IBEX_HOST": "10.0.0.1", "IBEX_ALLOW_PUBLIC_BIND": "true"}, ["IBEX_HOST=10.0.0.1", "IBEX_ENV"]),
    ],
)
def test_what_is_wrong_is_named(environ: dict[str, str], names: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_settings({**NO_FILE, **environ})

    assert all(name in caught.value.message for name in names)


@pytest.mark.parametrize(
    "environ",
    [
        {"IBEX_HOST": "127.0.0.2"},
        {"IBEX_HOST": "::1"},
        PRODUCTION,
        {**PRODUCTION, "IBEX_HOST": "0.0.0.0", "IBEX_METRICS_HOST": "0.0.0.0", "IBEX_ALLOW_PUBLIC_BIND": "true"},
        {"IBEX_ENV": "staging", "IBEX_LLM_MODE": "live"},
    ],
)
def test_a_safe_address_is_accepted(environ: dict[str, str]) -> None:
    assert load_settings({**NO_FILE, **environ}).host == environ.get("IBEX_HOST", "127.0.0.1")


def test_a_wrong_secret_is_not_quoted() -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_settings({**NO_FILE, "OPENAI_API_KEY": KEY, "IBEX_PORT": "x"})

    assert KEY not in caught.value.message


def test_misspelt_names_are_found() -> None:
    environ = {**NO_FILE, "IBEX_PROT": "1", "IBEX_PORT": "1", "IBEX_REDIS_URL_FILE": "x", "IBEX_DEV_TOKEN": "t"}

    assert unknown_names(environ) == ["IBEX_PROT"]


def test_a_child_sees_what_its_parent_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IBEX_PROT", "misspelt")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    settings = Settings(
        port=1234,
        openai_api_key=Secret(KEY),
        openai_models=("a", "b*"),
        redis_url=Secret("redis://:pw@h"),
        otel_headers=Secret("authorization=of-the-collector"),
        env="production",
    )

    worker = load_settings(child_environment(settings, with_provider_keys=True))
    recorder = child_environment(settings, with_provider_keys=False)

    assert worker == settings.model_copy(update={"llm_mode": "live"})
    assert KEY not in "".join(recorder.values())
    assert "of-the-collector" not in "".join(recorder.values())
    assert "IBEX_PROT" not in recorder
    assert load_settings(recorder).redis_url == settings.redis_url
    assert load_settings(recorder).resolved_llm_mode == "live"


def test_children_find_an_ibex_that_only_the_current_directory_has(monkeypatch: pytest.MonkeyPatch) -> None:
    root, elsewhere = str(Path(__file__).resolve().parents[1]), "/usr/lib/elsewhere"
    monkeypatch.setenv("PYTHONPATH", elsewhere)
    monkeypatch.setattr(sys, "path", [root, elsewhere])
    beside = child_environment(Settings(), with_provider_keys=False)
    monkeypatch.setattr(sys, "path", ["/usr/bin", root])
    installed = child_environment(Settings(), with_provider_keys=False)

    assert beside["PYTHONPATH"].split(os.pathsep) == [root, elsewhere]
    assert installed["PYTHONPATH"] == elsewhere


def test_loopback_is_asked_without_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "example.org")

    reach_loopback_directly()

    assert os.environ["NO_PROXY"].split(",") == ["example.org", "127.0.0.1", "localhost", "::1"]
    monkeypatch.delenv("no_proxy")


def test_every_setting_has_one_line_of_help_and_a_name() -> None:
    for field, info in Settings.model_fields.items():
        assert info.description
        assert environment_names(field)[0].startswith("IBEX_")
        secrets = {"redis_url", "https_proxy", "otel_headers"}
        assert is_secret(field) == ("dsn" in field or field.endswith("api_key") or field in secrets)
