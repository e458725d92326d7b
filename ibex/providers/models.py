"""The list of models a provider tells, read as a stranger's: what is malformed is left out or replaced."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from ibex.errors import ProviderUnavailable

MAX_LIST_BYTES: Final = 4 << 20

_ID: Final = re.compile(r"[!-~]{1,256}")
_OWNER: Final = re.compile(r"[ -~]{1,256}")


@dataclass(frozen=True, slots=True)
class Model:
    """One model that can be asked for."""

    id: str
    created: int
    """Unix seconds; 0 when the provider does not say."""
    owned_by: str


def read_models(body: bytes, serves: Callable[[str], bool], *, owner: str) -> tuple[Model, ...]:
    """Those models of OpenAI's list that are served; `owner` stands where an entry names none.

    Raises ProviderUnavailable when the body is no such list.
    """
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        found = None
    entries = found.get("data") if isinstance(found, dict) else None
    if not isinstance(entries, list):
        raise ProviderUnavailable("The model provider did not tell its models.")
    models = (_read_model(entry, owner) for entry in entries if isinstance(entry, dict))
    return tuple({model.id: model for model in models if model is not None and serves(model.id)}.values())


def _read_model(entry: dict[str, Any], owner: str) -> Model | None:
    model_id, created, owned_by = entry.get("id"), entry.get("created"), entry.get("owned_by")
    if not isinstance(model_id, str) or not _ID.fullmatch(model_id):
        return None
    if not isinstance(created, int) or isinstance(created, bool) or not 0 <= created < 1 << 53:
        created = 0
    if not isinstance(owned_by, str) or not _OWNER.fullmatch(owned_by):
        owned_by = owner
    return Model(model_id, created, owned_by)
