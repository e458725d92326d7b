"""The paths ibex answers, and the chat route's way from HTTP into the pipeline."""

import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

from ibex.config import Settings
from ibex.errors import MethodNotAllowed, NotFound
from ibex.pipeline.chat import ChatPipeline
from ibex.pipeline.reply import Call
from ibex.server.edge.head import forwardable
from ibex.server.edge.inbound import Inbound, check_declared_body, read_body
from ibex.server.edge.lookups import Lookups
from ibex.server.edge.ops import Operations
from ibex.server.edge.wire import WireReply

Handler = Callable[[Inbound, WireReply], Awaitable[None]]

_PARAMETERS: Final = {"{org_id}": "([^/]+)", "{id}": "(.+)"}
"""A model's id may hold slashes."""


@dataclass(frozen=True, slots=True)
class Route:
    """One path, or one shape of paths."""

    template: str
    name: str
    """What metrics and logs call it: from a closed set, whatever the path holds."""
    method: str
    handler: Callable[..., Awaitable[None]]
    """Where the template has a parameter, `path_parameter` gives its text as it stands in the path."""

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods it takes."""
        return ("GET", "HEAD") if self.method == "GET" else (self.method,)

    @property
    def has_parameter(self) -> bool:
        """Whether the template stands for many paths."""
        return "{" in self.template


class Routes:
    """The table of routes."""

    def __init__(self, settings: Settings, chat: ChatPipeline, lookups: Lookups, operations: Operations) -> None:
        self._settings = settings
        self._chat = chat
        self._table: list[Route] = [
            Route("/v1/chat/completions", "chat", "POST", self._serve_chat),
            Route("/v1/orgs/{org_id}/chat/completions", "chat", "POST", self._serve_chat),
            Route("/v1/models", "models", "GET", lookups.list_models),
            Route("/v1/models/{id}", "model", "GET", lookups.show_model),
            Route("/v1/internal/auth-probe", "auth_probe", "GET", lookups.probe),
            Route("/v1/orgs/{org_id}/auth-probe", "auth_probe", "GET", lookups.probe),
            Route("/health", "health", "GET", operations.health),
            Route("/ready", "ready", "GET", operations.ready),
        ]
        if settings.is_development:
            self._table.append(Route("/metrics", "metrics", "GET", operations.metrics))
        self._fixed: Mapping[str, Route] = {route.template: route for route in self._table if not route.has_parameter}
        self._shapes = [(_shape(route.template), route) for route in self._table if route.has_parameter]

    def __iter__(self) -> Iterator[Route]:
        return iter(self._table)

    def find(self, inbound: Inbound) -> tuple[str, Handler]:
        """The route's name and handler; raises NotFound, which names the routes there are, or MethodNotAllowed."""
        route, parameter = self._match(inbound.head.path)
        if inbound.head.method not in route.methods:
            raise MethodNotAllowed(headers={"Allow": ", ".join(route.methods)})
        handler = route.handler if parameter is None else partial(route.handler, path_parameter=parameter)
        return route.name, handler

    def template_of(self, path: str) -> str | None:
        """The path's shape, for spans; None when there is no such path."""
        try:
            return self._match(path)[0].template
        except NotFound:
            return None

    def _match(self, path: str) -> tuple[Route, str | None]:
        route = self._fixed.get(path)
        if route is not None:
            return route, None
        for shape, candidate in self._shapes:
            found = shape.fullmatch(path)
            if found is not None:
                return candidate, found[1]
        raise NotFound(f"There is no such path. There is: {', '.join(route.template for route in self._table)}.")

    def _serve_chat(self, inbound: Inbound, reply: WireReply, path_parameter: str | None = None) -> Awaitable[None]:
        check_declared_body(inbound, self._settings)
        headers = inbound.head.headers
        call = Call(
            authorization=headers.get("Authorization"),
            agent_id=headers.get("X-IBEX-Agent-ID"),
            session_id=headers.get("X-IBEX-Session-ID"),
            idempotency_key=headers.get("Idempotency-Key"),
            openai_beta=forwardable(headers.get("OpenAI-Beta")),
            path_org=path_parameter,
            address=inbound.address,
            request_id=inbound.request_id,
            clock=inbound.clock,
            trace=inbound.trace,
            read_body=lambda: read_body(inbound, self._settings),
            headers=inbound.reply_headers,
        )
        return self._chat.serve(call, reply)


def _shape(template: str) -> re.Pattern[str]:
    for parameter, pattern in _PARAMETERS.items():
        template = template.replace(parameter, pattern)
    return re.compile(template)
