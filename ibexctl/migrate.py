"""`ibexctl migrate`: the schemas of Postgres and of ClickHouse, up, one step down, and how they stand."""

import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer

from ibex.errors import ConfigurationError
from ibexctl.command import command, group
from ibexctl.operation import quiet_logging, read_settings
from ibexctl.output import Answer, Table

if TYPE_CHECKING:
    from ibex.config import Settings
    from ibex.engines.addresses import StoreAddresses
    from ibex.stores.migrations import Migration, Migrator

T = TypeVar("T")
Store = Literal["postgres", "clickhouse"]

app = group("Migrations: the schemas of Postgres and ClickHouse.")


@command(app, "up", example="ibexctl migrate up\nibexctl migrate up --seed")
def up(
    is_seeding: Annotated[
        bool, typer.Option("--seed", help="Then add the development organization, user, agent and token.")
    ] = False,
) -> Answer:
    """Apply every migration that is pending, to Postgres first, then to ClickHouse.

    One process at a time; servers of the version before go on beside it. Needs IBEX_POSTGRES_ADMIN_DSN; with embedded
    stores `ibexctl serve` does it by itself.
    """
    settings = read_settings()
    if is_seeding and not settings.is_development:
        raise ConfigurationError(
            f"The development seed has a token that everybody knows, and IBEX_ENV is {settings.env}.",
            hint="Make an organization of your own: `ibexctl org create NAME`.",
        )

    async def act(migrators: "dict[Store, Migrator]", addresses: "StoreAddresses") -> "list[tuple[Store, Migration]]":
        applied = [(store, migration) for store, migrator in migrators.items() for migration in await migrator.up()]
        if is_seeding:
            from ibex.stores.postgres.schema import seed_development

            await seed_development(addresses.postgres_admin)
        return applied

    applied = _migrate(act, settings)
    rows = [(store, migration.number, migration.name) for store, migration in applied]
    data = {
        "applied": [{"store": store, "number": number, "name": name} for store, number, name in rows],
        "is_seeded": is_seeding,
    }
    return Answer(data, (Table(("store", "number", "applied"), rows, empty="Everything was applied already."),))


@command(app, "down", example="ibexctl migrate down --store postgres")
def down(
    store: Annotated[Store, typer.Option("--store", help="Whose schema.")] = "postgres",
    is_sure: Annotated[bool, typer.Option("--yes", help="Do not ask a person at a terminal first.")] = False,
) -> Answer:
    """Take back the last migration, with the data it holds: one step.

    A person at a terminal is asked first.
    """
    if not is_sure and sys.stdin.isatty() and sys.stdout.isatty():
        typer.confirm(f"Take back the last migration of {store}, and lose what only it can hold?", abort=True, err=True)

    async def act(migrators: "dict[Store, Migrator]", _addresses: "StoreAddresses") -> "Migration | None":
        return await migrators[store].down()

    reverted = _migrate(act, read_settings())
    if reverted is None:
        return Answer({"reverted": None}, (f"{store} has no migration to take back.",))
    data = {"store": store, "number": reverted.number, "name": reverted.name}
    return Answer({"reverted": data}, (f"Took back {reverted.label} of {store}.",))


@command(app, "status", example="ibexctl migrate status")
def status() -> Answer:
    """Show which migrations are applied, and which are pending, on both stores."""

    async def act(migrators: "dict[Store, Migrator]", _addresses: "StoreAddresses") -> list[dict[str, object]]:
        found: list[dict[str, object]] = []
        for store, migrator in migrators.items():
            for known in await migrator.status():
                row = {"number": known.number, "name": known.name, "state": known.state}
                found.append({"store": store, **row, "applied_at": known.applied_at})
        return found

    migrations = _migrate(act, read_settings())
    is_current = all(migration["state"] == "applied" for migration in migrations)
    columns = ("store", "number", "name", "state", "applied_at")
    table = Table(columns, [[migration[column] for column in columns] for migration in migrations])
    notes = () if is_current else ("`ibexctl migrate up` applies what is pending.",)
    return Answer({"is_current": is_current, "migrations": migrations}, (table,), notes)


def _migrate(act: "Callable[[dict[Store, Migrator], StoreAddresses], Awaitable[T]]", settings: "Settings") -> T:
    """Run `act` on the migrators of both stores, Postgres' first: a running server's, or ones started for this."""
    import asyncio

    async def run() -> T:
        from ibex.engines.embedded import running_engines
        from ibex.runtime import clickhouse_migrator
        from ibex.stores.postgres.schema import postgres_migrator

        async with AsyncExitStack() as stack:
            addresses = await stack.enter_async_context(running_engines(settings, {"postgres_admin", "clickhouse"}))
            if not addresses.postgres_admin:
                raise ConfigurationError(
                    "IBEX_POSTGRES_ADMIN_DSN is not set: migrations are the database owner's.",
                    hint="Set it to the address of the same database, with the role ibex_owner.",
                )
            postgres = await stack.enter_async_context(postgres_migrator(addresses.postgres_admin))
            clickhouse = await stack.enter_async_context(clickhouse_migrator(addresses.clickhouse))
            return await act({"postgres": postgres, "clickhouse": clickhouse}, addresses)

    quiet_logging(settings)
    return asyncio.run(run())
