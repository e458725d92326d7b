"""The one settings model, and the only reader of the environment.

A setting comes from the environment, else from the file that `IBEX_ENV_FILE` names (default `.env`), else from its
default here. A secret may be given as a file instead: `OPENAI_API_KEY_FILE=/run/secrets/key`.
"""

from ibex.config.environment import (
    Origin,
    child_environment,
    find_origins,
    load_settings,
    reach_loopback_directly,
    settings_file,
    take_notify_socket,
    unknown_names,
)
from ibex.config.settings import (
    EMBEDDED,
    LOOPBACK,
    Environment,
    Secret,
    Settings,
    environment_names,
    is_secret,
)

__all__ = [
    "EMBEDDED",
    "LOOPBACK",
    "Environment",
    "Origin",
    "Secret",
    "Settings",
    "child_environment",
    "environment_names",
    "find_origins",
    "is_secret",
    "load_settings",
    "reach_loopback_directly",
    "settings_file",
    "take_notify_socket",
    "unknown_names",
]
