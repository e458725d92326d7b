"""Where Postgres is, and whether a pooler stands before it that gives each transaction another connection."""

from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlencode, urlsplit

_POOLED = "pgbouncer"


class PostgresAddress(NamedTuple):
    """What asyncpg is told of a DSN. Connections behind a pooler keep nothing from one transaction to the next."""

    dsn: str
    is_pooled: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Further arguments of asyncpg's."""
        # A prepared statement is one server connection's: where the next transaction has another, it is not known.
        return {"statement_cache_size": 0} if self.is_pooled else {}

    @classmethod
    def parse(cls, dsn: str) -> "PostgresAddress":
        """Read a DSN; `pgbouncer=true` among its parameters is ibex's own and says that a pooler is there."""
        parts = urlsplit(dsn)
        parameters = parse_qsl(parts.query, keep_blank_values=True)
        kept = [(name, value) for name, value in parameters if name != _POOLED]
        if kept == parameters:
            return cls(dsn)
        is_pooled = dict(parameters)[_POOLED].lower() in {"true", "1", "yes", "on"}
        return cls(parts._replace(query=urlencode(kept)).geturl(), is_pooled)
