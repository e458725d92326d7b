"""Whole JSON answers of the routes that are no chat."""

from typing import Any

import msgspec

from ibex.server.edge.wire import WireReply


async def answer_json(reply: WireReply, status: int, content: dict[str, Any]) -> None:
    """Answer with one JSON object."""
    body = msgspec.json.encode(content)
    reply.begin(status, {"Content-Type": "application/json"}, length=len(body))
    await reply.finish(body)
