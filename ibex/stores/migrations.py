"""Schema migrations: numbered SQL files, checksummed, run one after another on whichever database they are for."""

import re
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import ibex
from ibex.errors import ConfigurationError, SchemaMismatch

MigrationKind = Literal["postgres", "clickhouse"]

_FILE_NAME = re.compile(r"(\d{4})_([a-z0-9_]+)\.(up|down)\.sql", re.ASCII)


class Migration(NamedTuple):
    """One step of the schema, and the step back."""

    number: int
    name: str
    up_sql: str
    down_sql: str

    @property
    def checksum(self) -> str:
        """SHA-256 (hex) of the SQL that goes up: what was applied must be what the file says."""
        return sha256(self.up_sql.encode()).hexdigest()

    @property
    def label(self) -> str:
        """The file's name without its direction: `0001_tenancy`."""
        return f"{self.number:04}_{self.name}"


@dataclass(frozen=True, slots=True)
class AppliedMigration:
    """A row of `schema_migrations`: a migration this database has had."""

    number: int
    name: str
    checksum: str
    applied_at: datetime


@dataclass(frozen=True, slots=True)
class MigrationStatus:
    """One migration as the files and the database together know it."""

    number: int
    name: str
    state: Literal["applied", "pending", "changed", "unknown"]
    """`changed`: applied with other SQL than the file holds; `unknown`: applied by another ibex, no file here."""
    applied_at: datetime | None


class MigrationTarget(Protocol):
    """A database that migrations can be run on. Whoever opened it closes it."""

    name: str
    """How messages call it: `postgres`, `clickhouse`."""

    def exclusively(self) -> AbstractAsyncContextManager[None]:
        """Let nobody else migrate meanwhile, and make the `schema_migrations` table if it is missing."""
        ...

    async def applied(self) -> list[AppliedMigration]:
        """What has been applied, lowest number first; empty when nothing ever was. Changes nothing."""
        ...

    async def apply(self, migration: Migration) -> None:
        """Run `up_sql` and note it in `schema_migrations`: both or neither where the database has transactions."""
        ...

    async def revert(self, migration: Migration) -> None:
        """Run `down_sql` and strike the note out."""
        ...


class Migrator:
    """Brings one database to the schema its files describe."""

    def __init__(self, target: MigrationTarget, migrations: Sequence[Migration]) -> None:
        self._target = target
        self._migrations = tuple(migrations)

    async def up(self) -> list[Migration]:
        """Apply all that is pending, in order, and answer what was applied.

        Raises SchemaMismatch, before it changes anything, when what was applied is not what the files say.
        """
        async with self._target.exclusively():
            applied = await self._target.applied()
            self._check(applied)
            pending = self._migrations[len(applied) :]
            for migration in pending:
                await self._target.apply(migration)
            return list(pending)

    async def down(self) -> Migration | None:
        """Take back the last migration, one step; None when there is none."""
        async with self._target.exclusively():
            applied = await self._target.applied()
            self._check(applied)
            if not applied:
                return None
            if len(applied) > len(self._migrations):
                raise SchemaMismatch(
                    f"{self._target.name}: migration {applied[-1].number:04}_{applied[-1].name} is not known here.",
                    hint="Go down with the version of ibex that applied it.",
                )
            last = self._migrations[len(applied) - 1]
            await self._target.revert(last)
            return last

    async def status(self) -> list[MigrationStatus]:
        """Every migration known to the files or to the database, lowest number first."""
        applied = {row.number: row for row in await self._target.applied()}
        known = [_status(migration, applied.pop(migration.number, None)) for migration in self._migrations]
        return known + [MigrationStatus(row.number, row.name, "unknown", row.applied_at) for row in applied.values()]

    async def check(self) -> None:
        """Raise SchemaMismatch unless this version of ibex can serve on the schema as it is."""
        check_applied(self._target.name, self._migrations, await self._target.applied())

    def _check(self, applied: Sequence[AppliedMigration]) -> None:
        check_checksums(
            self._target.name,
            self._migrations,
            applied,
            hint="Applied migrations never change: restore the file, and put the change into a new migration.",
        )


def check_checksums(
    name: str, migrations: Sequence[Migration], applied: Sequence[AppliedMigration], *, hint: str
) -> None:
    """Raise SchemaMismatch when a migration was applied with other SQL than its file holds."""
    for migration, row in zip(migrations, applied, strict=False):
        if (migration.number, migration.checksum) != (row.number, row.checksum):
            raise SchemaMismatch(
                f"{name}: {row.number:04}_{row.name} was applied with other SQL than {migration.label} holds now.",
                hint=hint,
            )


def check_applied(name: str, migrations: Sequence[Migration], applied: Sequence[AppliedMigration]) -> None:
    """Raise SchemaMismatch unless code that knows `migrations` can serve on a database that has had `applied`.

    One migration more than the code knows is fine: while a new version is rolled out, the old one serves beside it.
    """
    version = f"is at {applied[-1].number:04}" if applied else "has no schema"
    if len(applied) < len(migrations):
        needed = f"this version of ibex needs {migrations[-1].label}"
        raise SchemaMismatch(f"{name} {version}; {needed}.", hint="Run `ibexctl migrate up`.")
    hint = "Install the version of ibex this database belongs to; `ibexctl migrate status` shows where they differ."
    check_checksums(name, migrations, applied, hint=hint)
    if len(applied) > len(migrations) + 1:
        known = f"this version of ibex knows {len(migrations):04} and serves at most one more"
        raise SchemaMismatch(f"{name} {version}; {known}.", hint=hint)


def find_migrations(kind: MigrationKind) -> list[Migration]:
    """The migrations of one kind of database, lowest number first: from the wheel, else from the checkout."""
    package = Path(ibex.__file__).parent
    for directory in (package / "_migrations" / kind, package.parent / "infra" / "migrations" / kind):
        if directory.is_dir():
            return read_migrations(directory)
    raise ConfigurationError(f"The {kind} migrations are missing from this installation.", hint="Install ibex again.")


def read_migrations(directory: Path) -> list[Migration]:
    """Read `NNNN_name.up.sql` and `NNNN_name.down.sql` pairs, numbered from 0001 without gaps."""
    halves: dict[tuple[int, str], dict[str, str]] = {}
    for path in sorted(directory.glob("*.sql")):
        match = _FILE_NAME.fullmatch(path.name)
        if match is None:
            raise ConfigurationError(
                f"{path.name} is not called like a migration (NNNN_name.up.sql, NNNN_name.down.sql)."
            )
        halves.setdefault((int(match[1]), match[2]), {})[match[3]] = path.read_text(encoding="utf-8")
    migrations = []
    for expected, ((number, name), sql) in enumerate(sorted(halves.items()), start=1):
        if number != expected:
            raise ConfigurationError(f"Migration {number:04}_{name} is out of order: {expected:04} was expected.")
        if sql.keys() != {"up", "down"}:
            raise ConfigurationError(f"Migration {number:04}_{name} lacks its other direction.")
        migrations.append(Migration(number, name, sql["up"], sql["down"]))
    return migrations


def _status(migration: Migration, applied: AppliedMigration | None) -> MigrationStatus:
    if applied is None:
        return MigrationStatus(migration.number, migration.name, "pending", None)
    state: Literal["applied", "changed"] = "applied" if applied.checksum == migration.checksum else "changed"
    return MigrationStatus(migration.number, migration.name, state, applied.applied_at)
