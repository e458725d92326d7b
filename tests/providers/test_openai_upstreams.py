"""The OpenAI provider's way to an upstream: private authorities, the egress proxy, and a key that is refused."""

import json
import os
from typing import Any

import pytest

from ibex.config import Secret, load_settings
from ibex.providers.events import event_data
from ibex.providers.openai import OpenAI
from ibex.sandbox import Sandbox
from ibex.telemetry import Metrics
from tests.providers.asking import KEY, call, fail, open_provider
from tests.providers.egress import egress_proxy

pytestmark = pytest.mark.asyncio(loop_factories=["uvloop"])  # the transport's own tests run on both loops


@pytest.mark.parametrize("is_proxied", [False, True])
async def test_an_upstream_of_a_private_authority_passes_chat_and_stream(certificates: Any, is_proxied: bool) -> None:
    context = certificates.serving("127.0.0.1")
    async with (
        Sandbox.serve(api_key=KEY, ssl_context=context) as sandbox,
        egress_proxy(sandbox.base_url) as proxy,
    ):
        environ = {"IBEX_ENV_FILE": os.devnull, "SSL_CERT_FILE": str(certificates.authority)}
        environ |= {"https_proxy": proxy.url, "NO_PROXY": ".internal" if is_proxied else "127.0.0.0/8"}
        provider = OpenAI(load_settings(environ), Metrics(), base_url=sandbox.base_url, api_key=Secret(KEY))
        reply = await provider.complete(call())
        assert json.loads(await reply.read())["choices"][0]["message"]["content"] == "OK"
        stream = await provider.complete(call(stream=True))
        events = [event_data(event) async for events in stream.events() for event in events]
        assert events[-1] == b"[DONE]"
        assert "gpt-4o-mini" in {model.id for model in await provider.list_models()}
        assert len(proxy.asked) == is_proxied
        await provider.close()


async def test_an_upstream_of_an_unknown_authority_is_refused_without_a_retry_and_logged(
    certificates: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        Sandbox.serve(api_key=KEY, ssl_context=certificates.serving("127.0.0.1")) as sandbox,
        open_provider(sandbox.base_url) as provider,
    ):
        error = await fail(provider, call())
    assert "certificate" in error.message
    assert error.attempts == 1
    assert caplog.messages == ["certificate refused"]


async def test_a_refused_key_is_logged_once_and_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    async with Sandbox.serve(api_key="another") as sandbox, open_provider(sandbox.base_url) as provider:
        for _ in range(3):
            await fail(provider, call())

    assert caplog.messages == ["the provider refuses the key, or what it may do"]
    assert KEY not in caplog.text
