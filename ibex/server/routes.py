"""The paths ibex answers, and the chat route's way from HTTP into the pipeline."""

from collections.abc import Awaitable, Callable

from ibex.config import Settings
from ibex.errors import MethodNotAllowed, NotFound
from ibex.pipeline.chat import ChatPipeline
from ibex.pipeline.reply import Call
from ibex.server.inbound import Inbound, check_declared_body, read_body
from ibex.server.ops import Operations
from ibex.server.wire import WireReply

Handler = Callable[[Inbound, WireReply], Awaitable[None]]


class Routes:
    """The table of routes: path → method → (name for metrics, handler)."""

    def __init__(self, settings: Settings, chat: ChatPipeline, operations: Operations) -> None:
        self._settings = settings
        self._chat = chat
        self._table: dict[str, dict[str, tuple[str, Handler]]] = {
            "/v1/chat/completions": {"POST": ("chat", self._serve_chat)},
            "/health": {"GET": ("health", operations.health)},
            "/ready": {"GET": ("ready", operations.ready)},
        }
        if settings.is_development:
            self._table["/metrics"] = {"GET": ("metrics", operations.metrics)}
        for methods in self._table.values():
            if "GET" in methods:
                methods["HEAD"] = methods["GET"]

    def find(self, inbound: Inbound) -> tuple[str, Handler]:
        """The route's name and handler; raises NotFound, which names the routes there are, or MethodNotAllowed."""
        methods = self._table.get(inbound.path)
        if methods is None:
            raise NotFound(f"There is no such path. There is: {', '.join(self._table)}.")
        found = methods.get(inbound.method)
        if found is None:
            raise MethodNotAllowed(headers={"Allow": ", ".join(methods)})
        return found

    async def _serve_chat(self, inbound: Inbound, reply: WireReply) -> None:
        check_declared_body(inbound, self._settings)
        headers = inbound.headers
        call = Call(
            authorization=headers.get("Authorization"),
            agent_id=headers.get("X-IBEX-Agent-ID"),
            session_id=headers.get("X-IBEX-Session-ID"),
            idempotency_key=headers.get("Idempotency-Key"),
            openai_beta=headers.get("OpenAI-Beta"),
            address=inbound.address,
            request_id=inbound.request_id,
            clock=inbound.clock,
            trace=inbound.trace,
            read_body=lambda: read_body(inbound, self._settings),
            headers=inbound.reply_headers,
        )
        await self._chat.serve(call, reply)
