"""Which session a turn belongs to."""

from ibex.domain.turns import is_external_id, mint_uuid7
from ibex.errors import ValidationFailed


def choose_session(header: str | None) -> str:
    """The session's external id: the client's, else a new one; raises ValidationFailed for one that cannot be."""
    if header is None:
        return f"sess_{mint_uuid7().hex}"
    if not is_external_id(header):
        raise ValidationFailed(
            "`X-IBEX-Session-ID` must be 1–64 characters of A–Z, a–z, 0–9 and `._:-`.", param="X-IBEX-Session-ID"
        )
    return header
