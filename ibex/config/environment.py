"""The only reader of the environment: settings come from it, from the settings file, else from their defaults."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dotenv import dotenv_values
from pydantic import (
    ValidationError,
)

from ibex.config.settings import LOOPBACK, Secret, Settings, environment_names, is_secret
from ibex.errors import ConfigurationError


def load_settings(environ: Mapping[str, str] | None = None, **overrides: Any) -> Settings:
    """Read the settings; `overrides` (flags of the command line) win over everything.

    Raises ConfigurationError with every wrong setting on a line of its own, never with a secret's value.
    """
    layers = _layers(os.environ if environ is None else environ)
    values: dict[str, Any] = {}
    names = {field: environment_names(field)[0] for field in Settings.model_fields}
    for field in Settings.model_fields:
        found = _find(field, layers)
        if found is not None:
            values[field] = found[0]
            names[field] = found[1].name or names[field]
    values.update({name: value for name, value in overrides.items() if value is not None})
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise ConfigurationError(_explain(error, names), hint="Every setting is described in .env.example.") from None


Source = Literal["flag", "environment", "settings file", "default"]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a setting's value comes from."""

    source: Source
    name: str | None = None
    """Under which name it was found there; `…_FILE` for a secret that lies in a file of its own."""


def find_origins(environ: Mapping[str, str] | None = None, **overrides: Any) -> dict[str, Origin]:
    """Where each setting's value comes from, by field; the arguments are those of `load_settings`."""
    layers = _layers(os.environ if environ is None else environ)
    origins: dict[str, Origin] = {}
    for field in Settings.model_fields:
        found = _find(field, layers)
        origins[field] = Origin("default") if found is None else found[1]
        if overrides.get(field) is not None:
            origins[field] = Origin("flag")
    return origins


def settings_file(environ: Mapping[str, str] | None = None) -> Path:
    """The settings file, whether it exists or not."""
    return Path((os.environ if environ is None else environ).get("IBEX_ENV_FILE") or ".env")


def unknown_names(environ: Mapping[str, str] | None = None) -> list[str]:
    """`IBEX_` names that are set and mean nothing: most likely misspelt."""
    known = {name for field in Settings.model_fields for name in environment_names(field)}
    known |= {
        f"{name}_FILE" for field in Settings.model_fields if is_secret(field) for name in environment_names(field)
    }
    known |= {"IBEX_ENV_FILE", *_CLIENT_NAMES}
    variables = {name for _, layer in _layers(os.environ if environ is None else environ) for name in layer}
    return sorted(name for name in variables if name.startswith("IBEX_") and name not in known)


def child_environment(settings: Settings, *, with_provider_keys: bool) -> dict[str, str]:
    """The environment of a child process: this one's, with the given settings written out, so that a child sees what
    its parent saw, flags of `serve` included. Provider keys go only where they are needed.
    """
    environ = {name: value for name, value in os.environ.items() if not name.startswith("IBEX_")}
    for field, value in settings:
        name, *usual_names = environment_names(field)
        for usual_name in usual_names if is_secret(field) and field not in _READ_BY_OTHERS else ():
            environ.pop(usual_name, None)
            environ.pop(f"{usual_name}_FILE", None)
        if value is None or value == Settings.model_fields[field].default:
            continue
        if field in _WORKERS_SECRETS and not with_provider_keys:
            continue
        environ[name] = _write(value)
    environ["IBEX_LLM_MODE"] = settings.resolved_llm_mode
    environ["IBEX_ENV_FILE"] = os.devnull
    environ |= _without_proxy_on_loopback(environ) | _path_to_this_package(environ)
    return environ


def reach_loopback_directly() -> None:
    """Have this process's HTTP libraries ask loopback addresses themselves, whatever HTTP_PROXY says."""
    os.environ.update(_without_proxy_on_loopback(os.environ))


def take_notify_socket() -> str | None:
    """Where a service manager listens, if one started this process; taken out: no child is to speak in its name."""
    return os.environ.pop("NOTIFY_SOCKET", None)


def _path_to_this_package(environ: Mapping[str, str]) -> dict[str, str]:
    """Children do not look for modules where they are started (`-P`): name the place if ibex was found only so, which
    is how `python -m ibexctl` finds it in a checkout that is not installed.
    """
    root = str(Path(__file__).resolve().parents[2])
    if sys.flags.safe_path or root in sys.path[1:] or str(Path(sys.path[0]).resolve()) != root:
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, (root, environ.get("PYTHONPATH"))))}


def _without_proxy_on_loopback(environ: Mapping[str, str]) -> dict[str, str]:
    exempt = environ.get("NO_PROXY") or environ.get("no_proxy") or ""
    hosts = ",".join(filter(None, (exempt, *LOOPBACK)))
    return {"NO_PROXY": hosts, "no_proxy": hosts}


def _write(value: object) -> str:
    if isinstance(value, Secret):
        return value.get_secret_value()
    return ",".join(value) if isinstance(value, tuple) else str(value)


_WORKERS_SECRETS = {"openai_api_key", "otel_headers"}
"""Secrets that no child but a worker has a use for."""

_READ_BY_OTHERS = {"https_proxy"}
"""Secrets whose usual names stay in a child's environment, since other libraries there read them too."""

_CLIENT_NAMES = {"IBEX_PROXY_ADDR", "IBEX_DEV_TOKEN", "IBEX_DEV_AGENT_ID"}
"""Names the smoke test reads; they are no settings of the server."""


_Layers = tuple[tuple[Source, Mapping[str, str]], ...]


def _layers(environ: Mapping[str, str]) -> _Layers:
    """The environment, then the settings file without the names that the environment has: an empty variable hides the
    file's.
    """
    from_file = _read_settings_file(environ)
    return ("environment", environ), (
        "settings file",
        {name: value for name, value in from_file.items() if value is not None and name not in environ},
    )


def _read_settings_file(environ: Mapping[str, str]) -> dict[str, str | None]:
    path = settings_file(environ)
    if not path.exists():
        if environ.get("IBEX_ENV_FILE"):
            raise ConfigurationError(f"IBEX_ENV_FILE names {path}, which does not exist.", hint="Check the path.")
        return {}
    try:
        return dotenv_values(path) if path.is_file() else {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"The settings file {path} cannot be read: {_reason(error)}.") from None


def _find(field: str, layers: _Layers) -> tuple[str, Origin] | None:
    for source, variables in layers:
        for name in environment_names(field):
            if variables.get(name):
                return variables[name], Origin(source, name)
            path = variables.get(f"{name}_FILE")
            if path and is_secret(field):
                return _read_secret(f"{name}_FILE", path), Origin(source, f"{name}_FILE")
    return None


def _read_secret(name: str, path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{name} names a file that cannot be read: {_reason(error)}.") from None


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return (error.strerror or type(error).__name__) if isinstance(error, OSError) else "it is not UTF-8"


def _explain(error: ValidationError, names: Mapping[str, str]) -> str:
    lines = []
    for fault in error.errors(include_url=False, include_input=False, include_context=False):
        field = str(fault["loc"][0]) if fault["loc"] else ""
        message = fault["msg"].removeprefix("Value error, ")
        lines.append(f"{names[field]}: {message}" if field in names else message)
    return "\n".join(lines)
