"""The sandbox's server: routes, and the answers that wait, stream, fail or break off as a request asks."""

import asyncio
import hashlib
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final
from urllib.parse import parse_qs, urlsplit

import msgspec

from ibex.sandbox.completions import MODELS, Completion, failure, model, unknown_model
from ibex.sandbox.peer import JSON, Peer, Request
from ibex.sandbox.record import Entry, RequestLog
from ibex.sandbox.requests import ChatRequest, Controls, read_controls, read_request

CHAT_PATH: Final = "/v1/chat/completions"
MODELS_PATH: Final = "/v1/models"
REQUESTS_PATH: Final = "/_sandbox/requests"
HANG_SECONDS: Final = 86_400.0


class Sandbox:
    """One sandbox. `requests` are the ones it was sent; `open_connections` how many sockets it holds."""

    def __init__(self, *, gap_ms: float = 0.0, api_key: str | None = None) -> None:
        self.gap_ms = gap_ms
        self.api_key = api_key
        """The only key accepted; None: any, or none."""
        self.base_url = ""
        self.requests = RequestLog()
        self._peers: set[Peer] = set()
        self._failed: dict[str, int] = {}

    @classmethod
    @asynccontextmanager
    async def serve(
        cls,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        gap_ms: float = 0.0,
        api_key: str | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> AsyncIterator["Sandbox"]:
        """Serve until the block ends; then every connection is closed. Raises OSError when it cannot listen."""
        sandbox = cls(gap_ms=gap_ms, api_key=api_key)
        loop = asyncio.get_running_loop()
        server = await loop.create_server(sandbox._make_peer, host, port, ssl=ssl_context, backlog=1024)
        scheme = "http" if ssl_context is None else "https"
        sandbox.base_url = f"{scheme}://{host}:{server.sockets[0].getsockname()[1]}/v1"
        try:
            yield sandbox
        finally:
            server.close()
            for peer in tuple(sandbox._peers):
                peer.abort()
            await server.wait_closed()

    @property
    def open_connections(self) -> int:
        """How many connections there are."""
        return len(self._peers)

    def _make_peer(self) -> Peer:
        return Peer(self._answer, self._peers)

    def _answer(self, peer: Peer, request: Request) -> None:
        url = urlsplit(request.target)
        if url.path == CHAT_PATH and request.method == "POST":
            self._answer_chat(peer, request)
        elif url.path == REQUESTS_PATH:
            self._answer_record(peer, request.method, url.query)
        elif not self._is_key_right(request):
            peer.send(401, failure(401, "Incorrect API key provided.", code="invalid_api_key"))
        elif url.path == MODELS_PATH and request.method == "GET":
            peer.send(200, msgspec.json.encode({"object": "list", "data": [model(name) for name in MODELS]}))
        elif url.path.startswith(MODELS_PATH + "/") and request.method == "GET":
            name = url.path.removeprefix(MODELS_PATH + "/")
            known = name in MODELS
            peer.send(200 if known else 404, msgspec.json.encode(model(name)) if known else unknown_model(name))
        else:
            peer.send(404, failure(404, f"Unknown request URL: {request.method} {url.path}.", code="unknown_url"))

    def _answer_record(self, peer: Peer, method: str, query: str) -> None:
        if method == "DELETE":
            self.requests.clear()
        limit = int(parse_qs(query).get("limit", ["1000"])[0])
        shown = [entry.show() for entry in self.requests.last(limit)]
        peer.send(200, msgspec.json.encode({"total": self.requests.total, "requests": shown}))

    def _answer_chat(self, peer: Peer, request: Request) -> None:
        entry = Entry(request.method, request.target, request.fields, request.body)
        self.requests.add(entry)
        peer.entry = entry
        if not self._is_key_right(request):
            peer.send(401, failure(401, "Incorrect API key provided.", code="invalid_api_key"))
            return
        try:
            chat = read_request(request.body)
            controls = read_controls(chat, request.field(b"x-sandbox"))
        except ValueError as error:
            peer.send(400, failure(400, f"The sandbox cannot read this: {error}."))
            return
        if not chat.is_model_known:
            peer.send(404, unknown_model(chat.model))
        elif not chat.messages:
            peer.send(400, failure(400, "[] is too short - 'messages'", param="messages"))
        elif chat.stream_options is not None and controls.refuse_stream_options:
            peer.send(400, failure(400, "Unrecognized request argument supplied: stream_options"))
        elif controls.delay_ms or chat.stream or _is_troubled(controls):
            peer.perform(self._act(peer, request, chat, controls))
        else:
            peer.send(200, Completion(chat, controls).body(), controls.headers)

    def _is_key_right(self, request: Request) -> bool:
        return self.api_key is None or request.field(b"authorization") == f"Bearer {self.api_key}".encode()

    async def _act(self, peer: Peer, request: Request, chat: ChatRequest, controls: Controls) -> None:
        await asyncio.sleep(controls.delay_ms / 1000)
        if controls.cut_after == -1:
            peer.abort()
        elif controls.hang_after == -1:
            await asyncio.sleep(HANG_SECONDS)
        elif controls.status is not None and self._is_failure_due(controls, request.body):
            self._fail(peer, controls)
        elif controls.raw is not None:
            await self._send_raw(peer, controls.raw, controls)
        elif chat.stream and controls.body is None:
            await self._stream(peer, chat, controls)
        else:
            await self._send_body(peer, chat, controls)

    def _is_failure_due(self, controls: Controls, body: bytes) -> bool:
        if controls.times is None:
            return True
        key = controls.key or hashlib.sha256(body).hexdigest()
        failed = self._failed.get(key, 0)
        if failed >= controls.times:
            self._failed.pop(key, None)
            return False
        self._failed[key] = failed + 1
        return True

    def _fail(self, peer: Peer, controls: Controls) -> None:
        status = controls.status or 500
        body = failure(status, "The sandbox was told to fail.")
        if isinstance(controls.error, str):
            body = controls.error.encode()
        elif controls.error is not None:
            body = msgspec.json.encode({"error": controls.error})
        headers = dict(controls.headers)
        if controls.retry_after is not None:
            headers["Retry-After"] = controls.retry_after
        peer.send(status, body, headers, controls.content_type or JSON)

    async def _send_raw(self, peer: Peer, raw: bytes, controls: Controls) -> None:
        size = controls.piece_bytes or len(raw) or 1
        for start in range(0, len(raw), size):
            await asyncio.sleep(self._gap(controls) if start else 0)
            await peer.write_raw(raw[start : start + size])
        peer.end_raw(controls.raw_end)

    async def _send_body(self, peer: Peer, chat: ChatRequest, controls: Controls) -> None:
        body = Completion(chat, controls).body()
        troubled_at = [after for after in (controls.cut_after, controls.hang_after) if after is not None]
        whole = body[: min(troubled_at)] if troubled_at else body
        peer.begin(200, controls.content_type or JSON, controls.headers, length=len(body))
        size = controls.piece_bytes or len(whole) or 1
        for start in range(0, len(whole), size):
            await asyncio.sleep(self._gap(controls) if start else 0)
            await peer.write(whole[start : start + size])
        await self._conclude(peer, controls, bool(troubled_at))

    async def _stream(self, peer: Peer, chat: ChatRequest, controls: Controls) -> None:
        events = Completion(chat, controls).events()
        troubled_at = [after for after in (controls.cut_after, controls.hang_after) if after is not None]
        if troubled_at:
            events = events[: min(troubled_at)]
        if controls.cut_at_byte is not None:
            events = [b"".join(events)[: controls.cut_at_byte]]
        gap = self._gap(controls)
        peer.begin(200, controls.content_type or "text/event-stream; charset=utf-8", controls.headers)
        if controls.piece_bytes is not None:
            whole, size = b"".join(events), controls.piece_bytes
            events = [whole[start : start + size] for start in range(0, len(whole), size)]
        if gap:
            for number, event in enumerate(events):
                await asyncio.sleep(gap if number else 0)
                await peer.write(event)
        else:
            for start in range(0, len(events), 64):
                await peer.write(*events[start : start + 64])
        await self._conclude(peer, controls, bool(troubled_at) or controls.cut_at_byte is not None)

    async def _conclude(self, peer: Peer, controls: Controls, is_troubled: bool) -> None:
        if not is_troubled:
            peer.finish()
        elif controls.hang_after is None or controls.cut_after is not None:
            peer.cut()
        else:
            await asyncio.sleep(HANG_SECONDS)

    def _gap(self, controls: Controls) -> float:
        return (self.gap_ms if controls.gap_ms is None else controls.gap_ms) / 1000


def _is_troubled(controls: Controls) -> bool:
    asked = (
        controls.status,
        controls.cut_after,
        controls.hang_after,
        controls.piece_bytes,
        controls.content_type,
        controls.raw,
    )
    return any(found is not None for found in asked)
