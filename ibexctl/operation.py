"""How a command reaches the stores: settings read, an operator opened, what changed told to the running servers."""

from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

from ibexctl.output import note

if TYPE_CHECKING:
    from ibex.config import Settings
    from ibex.runtime import Operator

T = TypeVar("T")


def read_settings(**overrides: Any) -> "Settings":
    """The settings, `overrides` (flags) above all; names that mean nothing are reported. Raises ConfigurationError."""
    from ibex.config import load_settings, unknown_names

    for name in unknown_names():
        note(f"warning: {name} is set and means nothing to ibex; `.env.example` lists every name.")
    return load_settings(**overrides)


def operate(
    action: "Callable[[Operator], Awaitable[T]]", *, settings: "Settings | None" = None, clickhouse: bool = False
) -> T:
    """Run `action` on the stores as their owner, and return what it returns.

    A running server's engines are used; without one, the embedded ones needed are started and stopped again.
    """
    import asyncio

    return asyncio.run(_operate(action, settings or read_settings(), clickhouse=clickhouse))


def change(action: "Callable[[Operator], Awaitable[T]]", changed: Callable[[T], Iterable[tuple[str, UUID]]]) -> T:
    """Run an action that commits a change, then tell running servers the kinds and ids that `changed` names.

    They would learn it from Postgres within a second or so anyhow: a store that cannot pass it on is a warning.
    """

    async def act(operator: "Operator") -> T:
        from ibex.stores.changes import Change

        from ibex.errors import StoreError

        outcome = await action(operator)
        try:
            await operator.publish(Change(kind, entity_id) for kind, entity_id in changed(outcome))
        except StoreError as error:
            note(f"warning: done, but running servers were not told at once ({error.message}); they see it within 5 s.")
        return outcome

    return operate(act)


async def _operate(action: "Callable[[Operator], Awaitable[T]]", settings: "Settings", *, clickhouse: bool) -> T:
    from ibex.runtime import open_operator

    quiet_logging(settings)
    async with open_operator(settings, clickhouse=clickhouse) as operator:
        return await action(operator)


def quiet_logging(settings: "Settings") -> None:
    """A command's own words are its output; log lines below a warning only with IBEX_LOG_LEVEL=debug."""
    import logging

    from ibex.telemetry import configure_logging

    configure_logging(settings, "ibexctl")
    if settings.log_level == "info":
        logging.getLogger("ibex").setLevel(logging.WARNING)
