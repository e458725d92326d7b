"""Finished turns for tests."""

import time
from typing import Any
from uuid import UUID, uuid4

from ibex.domain.turns import Outcome, Turn, mint_uuid7

ORG, AGENT = UUID(int=1), UUID(int=3)


def make_turn(**changes: Any) -> Turn:
    """A whole, complete turn of now; each argument replaces a field."""
    now = time.time_ns() // 1000
    fields: dict[str, Any] = {
        "turn_id": mint_uuid7(),
        "request_id": uuid4(),
        "org_id": ORG,
        "agent_id": AGENT,
        "external_id": "s-1",
        "outcome": Outcome.OK,
        "has_checkpoint": True,
        "is_complete": True,
        "is_streaming": False,
        "status_code": 200,
        "model": "gpt-4o-mini",
        "provider": "openai",
        "attempts": 1,
        "messages_sha256": b"m" * 32,
        "completion_sha256": b"c" * 32,
        "input_tokens": 10,
        "output_tokens": 20,
        "total_tokens": 30,
        "usage_source": "provider",
        "requested_at": now,
        "started_at": now,
        "completed_at": now,
        "provider_ttfb_ms": 3.5,
        "provider_latency_ms": 4.5,
        "total_latency_ms": 5.5,
    }
    return Turn(**{**fields, **changes})
