"""Whether a caller may use a path that names an organization."""

from ibex.domain.identity import Principal, parse_uuid
from ibex.errors import InsufficientPermissions


def check_path_organization(principal: Principal, path_org: str | None) -> None:
    """Raise InsufficientPermissions unless the path names the token's own organization, or none.

    What is no canonical UUID is nobody's organization: there is one answer for all that are not the caller's.
    """
    if path_org is not None and parse_uuid(path_org) != principal.org_id:
        raise InsufficientPermissions("The organization in the path is not the token's.")
