"""The OpenAI provider as tests ask it, mostly of the sandbox."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from ibex.config import Secret, Settings
from ibex.errors import RequestError
from ibex.providers.base import ProviderCall
from ibex.providers.openai import OpenAI
from ibex.telemetry import Metrics

KEY = "sk-test-0123456789"


@asynccontextmanager
async def open_provider(
    base_url: str, *, metrics: Metrics | None = None, key: str = KEY, **settings: Any
) -> AsyncIterator[OpenAI]:
    options = {"provider_retries": 0, **settings}
    provider = OpenAI(Settings(**options), metrics or Metrics(), base_url=base_url, api_key=Secret(key))
    try:
        yield provider
    finally:
        await provider.close()


def call(*, controls: dict[str, Any] | None = None, say: str = "Reply with exactly: OK", **fields: Any) -> ProviderCall:
    body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": say}], **fields}
    if controls is not None:
        body["metadata"] = {"sandbox": controls}
    return ProviderCall(json.dumps(body).encode(), is_streaming=bool(fields.get("stream")))


async def fail(provider: OpenAI, asked: ProviderCall) -> RequestError:
    with pytest.raises(RequestError) as caught:
        await provider.complete(asked)
    return caught.value
