"""Where the files of the deployments lie, and how the names they set are held to what ibex reads."""

import re
from pathlib import Path

from ibex.config import Settings, environment_names, is_secret
from ibex.server.recorder import DRAIN_SECONDS
from ibex.server.supervision.children import GRACE_SECONDS

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"

SETTINGS = {name for field in Settings.model_fields for name in environment_names(field)}
SECRETS = {name for field in Settings.model_fields if is_secret(field) for name in environment_names(field)}

BESIDES = DRAIN_SECONDS + 2 * GRACE_SECONDS
"""What a stop takes at most besides its two settings: the recorder's last delivery, and the grace for each part (s)."""


def strangers(text: str) -> set[str]:
    """The `IBEX_` names of a text that ibex does not read."""
    named = set(re.findall(r"\bIBEX_[A-Z0-9_]*[A-Z0-9]\b", text)) - {"IBEX_ENV_FILE"}
    return {name for name in named if name not in SETTINGS and name.removesuffix("_FILE") not in SECRETS}
