"""How a command reaches the stores: settings read, an operator opened, what changed told to the running servers."""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ibexctl.output import note

if TYPE_CHECKING:
    from ibex.config import Settings
    from ibex.runtime import Operator

T = TypeVar("T")


def read_settings(**overrides: Any) -> "Settings":
    """The settings, `overrides` (flags) above all; names that mean nothing are reported. Raises ConfigurationError."""
    from ibex.config import load_settings, reach_loopback_directly

    note_unknown_names()
    reach_loopback_directly()
    return load_settings(**overrides)


def note_unknown_names() -> None:
    """Warn of `IBEX_` names that are set and mean nothing: most likely misspelt."""
    from ibex.config import unknown_names

    for name in unknown_names():
        note(f"warning: {name} is set and means nothing to ibex; `.env.example` lists every name.")


def operate(action: "Callable[[Operator], Awaitable[T]]", *, settings: "Settings | None" = None, **stores: bool) -> T:
    """Run `action` on the stores as their owner, and return what it returns.

    A running server's engines are used; without one, the embedded ones needed are started and stopped again. `stores`
    are `open_operator`'s: what the action needs besides Postgres.
    """
    import asyncio

    return asyncio.run(_operate(action, settings or read_settings(), stores))


def change(action: "Callable[[Operator], Awaitable[T]]") -> T:
    """Run an action that commits changes, then tell the running servers of them.

    They learn them from Postgres anyhow, within 5 s: when they cannot be told at once, that is a warning.
    """

    async def act(operator: "Operator") -> T:
        outcome = await action(operator)
        changes = operator.identity.changes + operator.directives.changes
        is_told = await operator.publish((changed.kind, changed.entity_id) for changed in changes)
        if not is_told and _has_redis(operator):
            note("warning: done, but Redis did not pass it on: running servers see it within 5 s.")
        return outcome

    return operate(act)


def quiet_logging(settings: "Settings") -> None:
    """A command's own words are its output; log lines below a warning only with IBEX_LOG_LEVEL=debug."""
    import logging

    from ibex.telemetry import configure_logging

    configure_logging(settings, "ibexctl")
    if settings.log_level == "info":
        logging.getLogger("ibex").setLevel(logging.WARNING)


def _has_redis(operator: "Operator") -> bool:
    """Whether there is a Redis to publish in; an embedded one runs only while its server does."""
    from ibex.config import EMBEDDED

    return operator.addresses.redis != "" or operator.settings.redis_url.get_secret_value() != EMBEDDED


async def _operate(action: "Callable[[Operator], Awaitable[T]]", settings: "Settings", stores: dict[str, bool]) -> T:
    from ibex.runtime import open_operator

    quiet_logging(settings)
    async with open_operator(settings, **stores) as operator:
        return await action(operator)
