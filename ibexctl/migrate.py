"""`ibexctl migrate`: the schemas of Postgres and of ClickHouse, up, one step down, and how they stand."""

from ibexctl.command import command, group
from ibexctl.output import Answer

app = group("Migrations: the schemas of Postgres and of ClickHouse.")


@command(app, "status", example="ibexctl migrate status")
def status() -> Answer:
    """Show which migrations are applied."""
    raise NotImplementedError
