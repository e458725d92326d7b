"""The OpenAI provider against the sandbox, and against upstreams that no sandbox would be."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from ibex.config import Secret, Settings
from ibex.errors import InvalidRequest, ModelNotFound, ProviderTimeout, ProviderUnavailable, RateLimited, RequestError
from ibex.providers.base import ProviderCall
from ibex.providers.events import event_data
from ibex.providers.openai import OpenAI
from ibex.sandbox import Sandbox
from ibex.telemetry import Metrics
from ibex.telemetry.metrics import render_metrics
from tests.providers.asking import KEY, call, fail, open_provider
from tests.providers.upstream import Talk, serve_script

DIRECTIVE = "Always answer in the style of a mountain goat."

pytestmark = pytest.mark.asyncio(loop_factories=["uvloop"])  # the transport's own tests run on both loops


@pytest.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    async with Sandbox.serve(api_key=KEY) as sandbox:
        yield sandbox


async def test_a_reply_and_its_head_are_handed_on(sandbox: Sandbox) -> None:
    async with open_provider(sandbox.base_url) as provider:
        reply = await provider.complete(call())
        body = json.loads(await reply.read())
        assert body["choices"][0]["message"]["content"] == "OK"
        assert (reply.attempts, reply.ended_cleanly) == (1, True)
        assert reply.headers == {
            "Content-Type": "application/json",
            "openai-processing-ms": "1",
            "X-Provider-Request-ID": reply.provider_request_id,
        }
        assert 0 < reply.ttfb < 60


async def test_nothing_but_what_is_named_goes_to_the_provider(sandbox: Sandbox) -> None:
    asked = call()
    asked = ProviderCall(asked.body, is_streaming=False, trace_headers=((b"traceparent", b"00-a-b-01"),))
    async with open_provider(sandbox.base_url) as provider:
        await (await provider.complete(asked)).read()
        entry = sandbox.requests[0]
        assert entry.body == asked.body
        assert [name for name, _ in entry.headers] == [
            *("Host", "Content-Type", "Accept-Encoding", "User-Agent", "Authorization", "Accept", "traceparent"),
            "Content-Length",
        ]
        sent = dict(entry.fields)
        assert sent[b"Authorization"] == b"Bearer " + KEY.encode()
        assert (sent[b"Accept"], sent[b"Accept-Encoding"]) == (b"application/json", b"identity")


async def test_a_stream_is_whole_events_verbatim(sandbox: Sandbox) -> None:
    async with open_provider(sandbox.base_url) as provider:
        reply = await provider.complete(call(stream=True, controls={"piece_bytes": 7, "line_end": "\r\n"}))
        events = [event async for batch in reply.events() for event in batch]
        assert event_data(events[-1]) == b"[DONE]"
        text = [
            json.loads(event_data(event) or b"")["choices"][0]["delta"].get("content") or "" for event in events[:-1]
        ]
        assert "".join(text) == "OK"
        assert all(event.endswith(b"\r\n\r\n") for event in events)
        assert (reply.ended_cleanly, reply.unfinished) == (True, b"")
        assert reply.headers["Content-Type"] == "text/event-stream; charset=utf-8"


async def test_a_cut_stream_fails_after_its_last_whole_event(sandbox: Sandbox) -> None:
    async with open_provider(sandbox.base_url) as provider:
        reply = await provider.complete(call(stream=True, controls={"cut_after": 2}))
        events = []
        with pytest.raises(ProviderUnavailable) as caught:  # noqa: PT012
            async for batch in reply.events():
                events += batch
        assert len(events) == 2
        assert (caught.value.attempts, reply.ended_cleanly) == (1, False)


async def test_a_stream_that_stalls_times_out(sandbox: Sandbox) -> None:
    async with open_provider(sandbox.base_url, provider_idle_seconds=0.1) as provider:
        reply = await provider.complete(call(stream=True, controls={"hang_after": 1}))
        with pytest.raises(ProviderTimeout):
            [batch async for batch in reply.events()]


async def test_an_event_held_for_its_lf_is_delivered_before_the_failure() -> None:
    async def cut(talk: Talk) -> None:
        await talk.hear()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        await talk.say(head + b"9\r\ndata: a\n\r\r\n")

    async with serve_script(cut) as upstream, open_provider(upstream.base_url) as provider:
        reply = await provider.complete(call(stream=True))
        events = []
        with pytest.raises(ProviderUnavailable):  # noqa: PT012
            async for batch in reply.events():
                events += batch
        assert events == [b"data: a\n\r"]


async def test_a_released_stream_keeps_its_connection(sandbox: Sandbox) -> None:
    async with open_provider(sandbox.base_url) as provider:
        for _ in range(3):
            reply = await provider.complete(call(stream=True, controls={"gap_ms": 1}))
            async for batch in reply.events():
                if event_data(batch[-1]) == b"[DONE]":
                    break
            reply.release()
            await asyncio.sleep(0.02)
        assert sandbox.open_connections == 1


async def test_a_short_json_body_is_never_a_whole_one(sandbox: Sandbox) -> None:
    async with open_provider(sandbox.base_url) as provider:
        reply = await provider.complete(call(controls={"cut_after": 100}))
        with pytest.raises(ProviderUnavailable):
            await reply.read()
        assert not reply.ended_cleanly


async def test_a_200_that_is_no_json_is_handed_on(sandbox: Sandbox) -> None:
    async with open_provider(sandbox.base_url) as provider:
        reply = await provider.complete(call(controls={"body": "not json", "content_type": "text/plain"}))
        assert (await reply.read(), reply.headers["Content-Type"]) == (b"not json", "text/plain")


@pytest.mark.parametrize(
    ("is_streaming", "controls"),
    [
        (False, {"content_type": "text/event-stream"}),
        (False, {"headers": {"Content-Encoding": "gzip"}}),
        (True, {"content_type": "application/json"}),
        (True, {"content_type": "text/event-streams"}),
        (True, {"headers": {"Content-Encoding": "br"}}),
        (False, {"status": 201}),
        (False, {"status": 302, "headers": {"Location": "http://127.0.0.1:1/"}}),
    ],
)
async def test_an_answer_of_the_wrong_kind_is_refused(
    sandbox: Sandbox, is_streaming: bool, controls: dict[str, Any]
) -> None:
    async with open_provider(sandbox.base_url, provider_retries=3) as provider:
        error = await fail(provider, call(stream=is_streaming, controls=controls))
        assert (type(error), error.attempts, len(sandbox.requests)) == (ProviderUnavailable, 1, 1)


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
async def test_a_passing_failure_is_retried(sandbox: Sandbox, status: int) -> None:
    metrics = Metrics()
    async with open_provider(sandbox.base_url, metrics=metrics, provider_retries=2) as provider:
        reply = await provider.complete(call(controls={"status": status, "times": 1}))
        assert (await reply.read()).startswith(b"{")
        assert reply.attempts == 2
    text = render_metrics([metrics.snapshot()]).decode()
    assert 'ibex_proxy_provider_retries_total{provider="openai"} 1.0' in text
    assert f'provider_requests_total{{provider="openai",status_class="{status // 100}xx"}} 1.0' in text
    assert 'provider_requests_total{provider="openai",status_class="2xx"} 1.0' in text
    assert 'provider_duration_seconds_count{provider="openai"} 2.0' in text
    assert 'provider_ttfb_seconds_count{provider="openai"} 2.0' in text


@pytest.mark.parametrize(
    ("status", "kind"),
    [(429, RateLimited), (500, ProviderUnavailable), (503, ProviderUnavailable), (504, ProviderTimeout)],
)
async def test_retries_end(sandbox: Sandbox, status: int, kind: type[RequestError]) -> None:
    async with open_provider(sandbox.base_url, provider_retries=1) as provider:
        error = await fail(provider, call(controls={"status": status}))
        assert (type(error), error.attempts, len(sandbox.requests)) == (kind, 2, 2)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 408, 409, 413, 422, 501, 529])
async def test_no_other_failure_is_retried(sandbox: Sandbox, status: int) -> None:
    async with open_provider(sandbox.base_url, provider_retries=3) as provider:
        error = await fail(provider, call(controls={"status": status}))
        assert (error.attempts, len(sandbox.requests)) == (1, 1)


async def test_a_wait_beyond_the_budget_is_passed_on_and_not_waited_for(sandbox: Sandbox) -> None:
    async with open_provider(sandbox.base_url, provider_retries=3, provider_retry_wait_seconds=30) as provider:
        error = await fail(provider, call(controls={"status": 429, "retry_after": "31"}))
        assert (error.headers, error.attempts) == ({"Retry-After": "31"}, 1)


async def test_a_connection_that_cannot_be_made_is_retried(sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    async with open_provider(f"http://127.0.0.1:{port}/v1", provider_retries=2) as provider:
        error = await fail(provider, call())
        assert (isinstance(error, ProviderUnavailable), error.attempts, provider.is_away) == (True, 3, True)


async def test_a_connection_cut_before_the_first_byte_is_not_retried(sandbox: Sandbox) -> None:
    async with open_provider(sandbox.base_url, provider_retries=3) as provider:
        error = await fail(provider, call(controls={"cut_after": -1}))
        assert (isinstance(error, ProviderUnavailable), error.attempts) == (True, 1)


async def test_no_answer_in_time_is_a_timeout(sandbox: Sandbox) -> None:
    async with open_provider(sandbox.base_url, provider_first_byte_seconds=0.1, provider_retries=3) as provider:
        error = await fail(provider, call(controls={"hang_after": -1}))
        assert (isinstance(error, ProviderTimeout), error.attempts, provider.is_away) == (True, 1, True)
        await (await provider.complete(call())).read()
        assert not provider.is_away


async def test_a_wrong_key_is_no_fault_of_the_client(sandbox: Sandbox) -> None:
    async with open_provider(sandbox.base_url, key="sk-wrong-key-of-ours") as provider:
        error = await fail(provider, call())
        assert (type(error), error.message) == (ProviderUnavailable, ProviderUnavailable.default_message())
        provider.set_api_key(Secret(KEY))
        await (await provider.complete(call())).read()


async def test_an_unknown_model_is_told_so(sandbox: Sandbox) -> None:
    async with open_provider(sandbox.base_url) as provider:
        error = await fail(provider, call(model="no-such-model-7"))
        assert (type(error), error.param) == (ModelNotFound, "model")
        assert "no-such-model-7" in error.message


async def test_an_error_names_neither_key_nor_directive(sandbox: Sandbox) -> None:
    message = f"Invalid: {KEY} and [{{'role': 'system', 'content': '{DIRECTIVE}'}}]"
    asked = call(controls={"status": 400, "error": {"message": message, "param": DIRECTIVE}})
    asked = ProviderCall(asked.body, is_streaming=False, redact=(DIRECTIVE,))
    async with open_provider(sandbox.base_url) as provider:
        error = await fail(provider, asked)
        assert error.message == "Invalid: [redacted] and [{'role': 'system', 'content': '[redacted]'}]"
        assert error.param == "[redacted]"


@pytest.mark.parametrize("controls", [{"error": "x" * 100_000}, {"headers": {"Content-Encoding": "gzip"}}])
async def test_the_status_of_an_error_counts_when_its_text_cannot_be_read(
    sandbox: Sandbox, controls: dict[str, Any]
) -> None:
    async with open_provider(sandbox.base_url) as provider:
        error = await fail(provider, call(controls={"status": 422, **controls}))
        assert (type(error), error.http_status, error.message) == (
            InvalidRequest,
            422,
            InvalidRequest.default_message(),
        )


async def test_an_upstream_that_refuses_usage_is_asked_once_without(sandbox: Sandbox) -> None:
    controls = {"refuse_stream_options": True}
    without = call(stream=True, controls=controls)
    with_usage = call(stream=True, controls=controls, stream_options={"include_usage": True})
    asked = ProviderCall(with_usage.body, is_streaming=True, make_body_without_usage=lambda: without.body)
    async with open_provider(sandbox.base_url) as provider:
        assert provider.accepts_stream_usage
        for requests in (2, 3):
            reply = await provider.complete(asked)
            assert [batch async for batch in reply.events()]
            assert not reply.has_usage_asked
            assert not provider.accepts_stream_usage
            assert len(sandbox.requests) == requests


async def test_a_client_that_asked_for_usage_itself_hears_the_refusal(sandbox: Sandbox) -> None:
    asked = call(stream=True, controls={"refuse_stream_options": True}, stream_options={"include_usage": True})
    async with open_provider(sandbox.base_url) as provider:
        assert isinstance(await fail(provider, asked), InvalidRequest)
        assert provider.accepts_stream_usage


async def test_usage_is_never_asked_for_where_the_setting_says_so(sandbox: Sandbox) -> None:
    async with open_provider(sandbox.base_url, openai_stream_usage="never") as provider:
        assert not provider.accepts_stream_usage


@pytest.mark.parametrize(
    ("controls", "is_streaming"),
    [
        ({"hang_after": -1}, False),
        ({"hang_after": 5}, False),
        ({"hang_after": 1}, True),
        ({"gap_ms": 5, "events": 1000}, True),
    ],
)
async def test_a_cancelled_call_ends_upstream_at_once(
    sandbox: Sandbox, controls: dict[str, Any], is_streaming: bool
) -> None:
    async def relay(provider: OpenAI) -> None:
        reply = await provider.complete(call(stream=is_streaming, controls=controls))
        if is_streaming:
            async for _ in reply.events():
                pass
        else:
            await reply.read()

    async with open_provider(sandbox.base_url) as provider:
        relaying = asyncio.gather(relay(provider))
        async with asyncio.timeout(20):
            while not len(sandbox.requests):  # noqa: ASYNC110 (the sandbox tells nobody)
                await asyncio.sleep(0.001)
        await asyncio.sleep(0.02)
        entry = sandbox.requests[0]
        assert entry.ended is None
        relaying.cancel()
        async with asyncio.timeout(2):
            while entry.ended is None:  # noqa: ASYNC110 (the sandbox tells nobody)
                await asyncio.sleep(0.001)
        assert entry.ended == "client_disconnect"


async def test_a_cancelled_wait_between_retries_sends_nothing_more(sandbox: Sandbox) -> None:
    async with open_provider(sandbox.base_url, provider_retries=3) as provider:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await provider.complete(call(controls={"status": 503, "retry_after": "5"}))
        assert len(sandbox.requests) == 1


@pytest.mark.parametrize(
    ("models", "model", "serves"),
    [
        (("*",), "anything", True),
        (("gpt-*", "o?"), "gpt-4o", True),
        (("gpt-*", "o?"), "o3", True),
        (("gpt-*", "o?"), "GPT-4o", False),
        ((), "gpt-4o", False),
    ],
)
async def test_models_are_chosen_by_globs(models: tuple[str, ...], model: str, serves: bool) -> None:
    async with open_provider("http://127.0.0.1:1/v1", openai_models=models) as provider:
        assert provider.serves(model) is serves


async def test_a_key_that_cannot_stand_in_a_header_is_refused_without_being_shown() -> None:
    with pytest.raises(ValueError, match="header field") as caught:
        OpenAI(Settings(), Metrics(), base_url="http://127.0.0.1:1", api_key=Secret("sk-secret\r\nX: y"))
    assert "sk-secret" not in str(caught.value)


async def test_a_call_shows_none_of_its_content() -> None:
    assert repr(ProviderCall(b"secret words", is_streaming=True)) == "ProviderCall(12 bytes, is_streaming=True)"
