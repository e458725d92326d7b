"""The request that the running code works for, so that a log line written on its behalf tells which one it was."""

from contextvars import ContextVar
from typing import Any, Protocol


class Logged(Protocol):
    """A request, as far as log lines name it."""

    def log_facts(self) -> dict[str, Any]:
        """Its ids, those that are known by now: `request_id`, `turn_id`, `trace_id`."""
        ...


current_request: ContextVar[Logged | None] = ContextVar("current_request", default=None)
"""Set for as long as the request is served. The tasks it starts inherit it; threads and other tasks have none."""


def facts_of_current_request() -> dict[str, Any]:
    """What every log line says of the request it belongs to; nothing outside of one."""
    request = current_request.get()
    return {} if request is None else request.log_facts()
