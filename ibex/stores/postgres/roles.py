"""Whether a Postgres role is one that row security binds: what `serve` must work as."""

from dataclasses import dataclass

from ibex.errors import ConfigurationError
from ibex.stores.postgres.pool import Postgres

_HINT = (
    "Let IBEX_POSTGRES_DSN log in as ibex_app; infra/scripts/postgres_roles.sql makes that role. "
    "The owner belongs into IBEX_POSTGRES_ADMIN_DSN."
)

_RIGHTS = """
select r.rolname, r.rolsuper, r.rolbypassrls,
    exists (
        select from pg_class c join pg_namespace n on n.oid = c.relnamespace
        where n.nspname = 'ibex_core' and pg_has_role(r.oid, c.relowner, 'member')
        union all
        select from pg_namespace n where n.nspname = 'ibex_core' and pg_has_role(r.oid, n.nspowner, 'member')
        union all
        select from pg_database d where d.datname = current_database() and pg_has_role(r.oid, d.datdba, 'member')
    ) as is_owner
from pg_roles r where r.rolname = session_user
"""


@dataclass(frozen=True, slots=True)
class RoleRights:
    """What a role could do beside what ibex's schema grants it."""

    name: str
    is_superuser: bool
    bypasses_row_security: bool
    is_owner: bool
    """Whether it owns ibex's schema, a table of it or the database, or may become the role that does."""

    @property
    def fault(self) -> str | None:
        """Why row security does not bind this role; None: it does."""
        if self.is_superuser:
            return "is a superuser"
        if self.bypasses_row_security:
            return "bypasses row security"
        return "owns what it should only use" if self.is_owner else None


async def read_rights(postgres: Postgres) -> RoleRights:
    """The rights of the role that is logged in; raises StoreUnavailable."""
    async with postgres.transaction(operation="read_rights") as connection:
        row = await connection.fetchrow(_RIGHTS)
    assert row is not None  # noqa: S101 (a session has a role)
    return RoleRights(row["rolname"], row["rolsuper"], row["rolbypassrls"], row["is_owner"])


async def refuse_powerful_role(postgres: Postgres) -> None:
    """Raise ConfigurationError when one mistake in a statement could show one tenant's rows to another."""
    rights = await read_rights(postgres)
    if rights.fault is not None:
        raise ConfigurationError(
            f"IBEX_POSTGRES_DSN logs in as {rights.name}, which {rights.fault}: tenants would not be kept apart.",
            hint=_HINT,
        )
