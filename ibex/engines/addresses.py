"""Where the stores are: the settings' own DSNs, and for each embedded one what the running server has written down."""

from collections.abc import Collection
from dataclasses import dataclass

from ibex.config import EMBEDDED, Settings
from ibex.engines.datadir import DataDirectory
from ibex.engines.processes import ProcessIdentity
from ibex.errors import ConfigurationError, ServerNotRunning

RUN_FILE = "engines.json"
ALL_STORES = frozenset({"postgres", "postgres_admin", "redis", "clickhouse"})
"""The fields of StoreAddresses."""


@dataclass(frozen=True, slots=True, repr=False)
class StoreAddresses:
    """The DSN of each store, passwords included. An empty one means: not to be had here."""

    postgres: str = ""
    """As the application's role."""
    postgres_admin: str = ""
    """As the owner; empty when `IBEX_POSTGRES_DSN` is a real address and no owner's was given."""
    redis: str = ""
    clickhouse: str = ""

    def __repr__(self) -> str:
        return "StoreAddresses(**********)"


def embedded_stores(settings: Settings) -> frozenset[str]:
    """Which fields of StoreAddresses this data directory's own engines give."""
    given = _given(settings)
    if given["postgres"] != EMBEDDED:
        if given["postgres_admin"] == EMBEDDED:  # not set: the owner's address is needed by operator commands alone
            del given["postgres_admin"]
    elif given["postgres_admin"] != EMBEDDED:
        raise ConfigurationError(
            "IBEX_POSTGRES_ADMIN_DSN is set and IBEX_POSTGRES_DSN is not.",
            hint="Set both, to the same database as its owner and as the application's role, or neither.",
        )
    return frozenset(store for store, dsn in given.items() if dsn == EMBEDDED)


def given_addresses(settings: Settings) -> dict[str, str]:
    """The fields of StoreAddresses that the settings give themselves."""
    return {store: dsn for store, dsn in _given(settings).items() if dsn != EMBEDDED}


def resolve_addresses(settings: Settings, stores: Collection[str] = ALL_STORES) -> StoreAddresses:
    """Where the stores are now; the embedded ones among `stores` must run, others may be empty.

    Raises ServerNotRunning when one is needed and no server runs it.
    """
    embedded = embedded_stores(settings) & frozenset(stores)
    addresses = given_addresses(settings)
    if embedded:
        addresses |= _running(settings, embedded)
    return StoreAddresses(**addresses)


def _given(settings: Settings) -> dict[str, str]:
    return {
        "postgres": settings.postgres_dsn.get_secret_value(),
        "postgres_admin": settings.postgres_admin_dsn.get_secret_value(),
        "redis": settings.redis_url.get_secret_value(),
        "clickhouse": settings.clickhouse_dsn.get_secret_value(),
    }


def is_running(directory: DataDirectory) -> bool:
    """Whether a server runs engines on this data directory and has written down where."""
    return _read(directory) is not None


def _running(settings: Settings, stores: frozenset[str]) -> dict[str, str]:
    directory = DataDirectory(settings.data_dir)
    running = _read(directory)
    if running is None:
        raise ServerNotRunning(
            f"No ibex server is running on {directory.path}.", hint="Start one with `ibexctl serve`."
        )
    if missing := stores - running.keys():
        raise ServerNotRunning(
            f"The server on {directory.path} runs no embedded {', '.join(sorted(missing))}.",
            hint="Give this command the same settings as the server.",
        )
    return {store: running[store] for store in stores}


def _read(directory: DataDirectory) -> dict[str, str] | None:
    """What is written down, unless it is from a server that is gone."""
    match directory.read_run_file(RUN_FILE):
        case {"server": server, "addresses": dict(addresses)}:
            process = ProcessIdentity.from_json(server)
            return addresses if process is not None and process.is_alive else None
        case _:
            return None
