"""Which session a turn belongs to."""

from ibex.domain.turns import TurnId, is_external_id
from ibex.errors import ValidationFailed


def check_session(header: str | None) -> None:
    """Raise ValidationFailed for an external id that cannot be one."""
    if header is not None and not is_external_id(header):
        raise ValidationFailed(
            "`X-IBEX-Session-ID` must be 1–64 characters of A–Z, a–z, 0–9 and `._:-`.", param="X-IBEX-Session-ID"
        )


def choose_session(header: str | None, turn_id: TurnId) -> str:
    """The session's external id: the client's, checked, else a new one named by its first turn."""
    check_session(header)
    return f"sess_{turn_id.hex}" if header is None else header
