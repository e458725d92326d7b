"""What operators look up."""

from uuid import uuid4

import pytest

from ibex.errors import OperatorError, UnknownEntity
from ibex.stores.postgres.identity_admin import IdentityAdmin
from ibex.stores.postgres.identity_directory import IdentityDirectory
from ibex.stores.postgres.pool import Postgres


async def test_an_organization_is_found_by_id_or_by_its_only_name(admin: IdentityAdmin, owner: Postgres) -> None:
    directory = IdentityDirectory(owner)
    acme = (await admin.create_org("acme"))["org_id"]
    assert await directory.find_org("acme") == await directory.find_org(str(acme)) == acme
    for unknown in ("bolt", str(uuid4())):
        with pytest.raises(UnknownEntity):
            await directory.find_org(unknown)
    await admin.create_org("acme")
    with pytest.raises(OperatorError, match="Several organizations are called acme"):
        await directory.find_org("acme")
    await admin.create_org(str(acme))
    assert await directory.find_org(str(acme)) == acme
