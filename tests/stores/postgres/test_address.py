"""A DSN says whether a pooler stands before Postgres; everything else in it is asyncpg's."""

import pytest

from ibex.errors import ConfigurationError
from ibex.stores.postgres.address import PostgresAddress
from ibex.stores.postgres.schema import postgres_migrator


@pytest.mark.parametrize(
    ("dsn", "plain", "is_pooled"),
    [
        ("postgresql://u:p%40@h/d", "postgresql://u:p%40@h/d", False),
        ("postgresql://u:p%40@h/d?sslmode=require", "postgresql://u:p%40@h/d?sslmode=require", False),
        ("postgresql://u:p%40@h/d?pgbouncer=true", "postgresql://u:p%40@h/d", True),
        ("postgresql://u@h/d?pgbouncer=false", "postgresql://u@h/d", False),
        (
            "postgresql://u@/d?host=/run/pg&pgbouncer=true&sslmode=disable",
            "postgresql://u@/d?host=%2Frun%2Fpg&sslmode=disable",
            True,
        ),
    ],
)
def test_what_is_ibexs_own_in_a_dsn_is_taken_out_of_it(dsn: str, plain: str, is_pooled: bool) -> None:
    address = PostgresAddress.parse(dsn)
    assert (address.dsn, address.is_pooled) == (plain, is_pooled)
    assert address.options == ({"statement_cache_size": 0} if is_pooled else {})


async def test_migrations_refuse_a_pooler() -> None:
    with pytest.raises(ConfigurationError, match="goes through a pooler") as caught:
        async with postgres_migrator("postgresql://ibex_owner:secret@h/d?pgbouncer=true"):
            raise AssertionError
    assert "secret" not in str(caught.value)
