"""The request that the running code works for, so that a log line written on its behalf tells which one it was."""

from contextvars import ContextVar
from typing import Any, Protocol


class Logged(Protocol):
    """A request, as far as log lines name it."""

    def log_facts(self) -> dict[str, Any]:
        """Its ids, those that are known by now: `request_id`, `turn_id`, `trace_id`."""
        ...


class RequestScope:
    """The time in which one request is served.

    Whatever the request starts (sockets, timers, tasks) inherits its scope, and may live on and work for others; so the
    scope is emptied when the request is over. Then it neither names the wrong request nor keeps one in memory.
    """

    __slots__ = ("_request",)

    def __init__(self, request: Logged) -> None:
        """Log lines written from now on are the request's."""
        self._request: Logged | None = request
        _current.set(self)

    def end(self) -> None:
        """The request is over."""
        self._request = None

    def log_facts(self) -> dict[str, Any]:
        """What a log line says of the request; nothing once it is over."""
        return {} if self._request is None else self._request.log_facts()


_current: ContextVar[RequestScope | None] = ContextVar("current_request", default=None)


def facts_of_current_request() -> dict[str, Any]:
    """What every log line says of the request it belongs to; nothing outside of one."""
    scope = _current.get()
    return {} if scope is None else scope.log_facts()
