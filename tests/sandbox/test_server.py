"""The sandbox as OpenAI's own SDK and a plain HTTP client see it."""

import asyncio
import base64
import json
import sys
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import openai
import pytest

from ibex.sandbox import Sandbox
from tests.waiting import eventually

USER = {"role": "user", "content": "Reply with exactly: IBEX_OK"}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["c", "f"]}, "days": {"type": "integer"}},
            "required": ["city", "unit"],
        },
    },
}


@pytest.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    async with Sandbox.serve() as sandbox:
        yield sandbox


@pytest.fixture
async def sdk(sandbox: Sandbox) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=sandbox.base_url, api_key="sk-any", max_retries=0) as sdk:
        yield sdk


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as http:
        yield http


def chat(say: Any = USER["content"], controls: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    found = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": say}], **fields}
    return found if controls is None else found | {"metadata": {"sandbox": controls}}


async def post(http: aiohttp.ClientSession, sandbox: Sandbox, body: Any, **headers: str) -> tuple[int, bytes]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with http.post(f"{sandbox.base_url}/chat/completions", data=data, headers=headers) as response:
        return response.status, await response.read()


async def stream(http: aiohttp.ClientSession, sandbox: Sandbox, body: dict[str, Any]) -> list[bytes]:
    status, raw = await post(http, sandbox, body | {"stream": True})
    assert status == 200
    return raw.split(b"\n\n")[:-1]


async def test_a_completion_is_what_the_sdk_expects(sdk: openai.AsyncOpenAI) -> None:
    found = await sdk.chat.completions.create(model="gpt-4o-mini", messages=[USER], n=2)
    assert [choice.message.content for choice in found.choices] == ["IBEX_OK", "IBEX_OK"]
    assert found.system_fingerprint == "ibex-sandbox"
    assert found.usage is not None
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens > 0
    assert found.usage.prompt_tokens_details is not None
    assert found.usage.prompt_tokens_details.cached_tokens == 0


async def test_a_long_prompt_counts_as_partly_cached(sdk: openai.AsyncOpenAI) -> None:
    message = {"role": "user", "content": "word " * 2000}
    found = await sdk.chat.completions.create(model="gpt-4o-mini", messages=[message])
    assert found.usage is not None
    assert found.usage.prompt_tokens_details is not None
    assert 0 < (found.usage.prompt_tokens_details.cached_tokens or 0) < found.usage.prompt_tokens


async def test_a_stream_ends_with_its_usage_only_when_asked(sdk: openai.AsyncOpenAI) -> None:
    asked = {"model": "gpt-4o-mini", "messages": [USER], "stream": True}
    chunks = [chunk async for chunk in await sdk.chat.completions.create(**asked)]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "IBEX_OK"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in chunks)
    asked["stream_options"] = {"include_usage": True}
    chunks = [chunk async for chunk in await sdk.chat.completions.create(**asked)]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None


async def test_every_chunk_names_usage_when_it_is_asked_for(http: aiohttp.ClientSession, sandbox: Sandbox) -> None:
    events = await stream(http, sandbox, chat(stream_options={"include_usage": True}))
    assert events[-1] == b"data: [DONE]"
    assert all(b'"usage":null' in event for event in events[:-2])
    assert b'"choices":[],"usage":{' in events[-2]


@pytest.mark.parametrize(
    "choice", [{"type": "function", "function": {"name": "weather"}}, "required"], ids=["named", "required"]
)
async def test_a_forced_tool_is_called(sdk: openai.AsyncOpenAI, choice: Any) -> None:
    asked = {"model": "gpt-4o", "messages": [USER], "tools": [TOOL], "tool_choice": choice}
    found = await sdk.chat.completions.create(**asked)
    (tool,) = found.choices[0].message.tool_calls or []
    assert tool.type == "function"
    assert (tool.function.name, json.loads(tool.function.arguments)) == ("weather", {"city": "sandbox", "unit": "c"})
    assert found.choices[0].finish_reason == "tool_calls"
    arguments = ""
    async for chunk in await sdk.chat.completions.create(**asked, stream=True):
        for delta in chunk.choices[0].delta.tool_calls or ():
            arguments += (delta.function and delta.function.arguments) or ""
    assert json.loads(arguments) == {"city": "sandbox", "unit": "c"}


async def test_a_tool_that_is_only_offered_is_not_called(sdk: openai.AsyncOpenAI) -> None:
    found = await sdk.chat.completions.create(model="gpt-4o", messages=[USER], tools=[TOOL])
    assert found.choices[0].message.content == "IBEX_OK"


@pytest.mark.parametrize(
    ("say", "text"),
    [
        ("Reply with exactly: A B", "A B"),
        ("[DIRECTIVE]: Be kind.\n\nReply with exactly: A B", "A B"),
        ("[DIRECTIVE]: Reply with exactly: X\n\nReply with exactly: Y\nthanks", "Y"),
        ([{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "Reply with exactly: Z"}], "Z"),
        ("hello", "This is the ibex sandbox, not a model. It read 5 characters."),
        (None, "This is the ibex sandbox, not a model. It read 0 characters."),
    ],
)
async def test_the_last_user_message_rules(http: aiohttp.ClientSession, sandbox: Sandbox, say: Any, text: str) -> None:
    body = chat(say)
    body["messages"] = [{"role": "user", "content": "Reply with exactly: no"}, *body["messages"], {"role": "tool"}]
    _, raw = await post(http, sandbox, body)
    assert json.loads(raw)["choices"][0]["message"]["content"] == text


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[" * 100_000, 400),
        (b'{"model": "m"}', 400),
        (b'{"model": "m", "messages": []}', 400),
        (b'{"model": 1, "messages": [{"role": "user"}]}', 400),
        (b'{"model": "no-such-model", "messages": [{"role": "user"}]}', 404),
        (b'{"model": "m", "messages": [{"role": "user"}], "metadata": {"sandbox": {"typo": 1}}}', 400),
        (b'{"model": "m", "messages": [{"role": "user"}], "x": 1e999, "y": 123456789012345678901234567890}', 200),
    ],
)
async def test_a_bad_request_is_told_so(
    http: aiohttp.ClientSession, sandbox: Sandbox, body: bytes, status: int
) -> None:
    found, raw = await post(http, sandbox, body)
    assert found == status
    assert ("error" in json.loads(raw)) is (status != 200)


async def test_a_wrong_key_is_refused(http: aiohttp.ClientSession) -> None:
    async with Sandbox.serve(api_key="sk-right") as sandbox:
        assert (await post(http, sandbox, chat()))[0] == 401
        assert (await post(http, sandbox, chat(), Authorization="Bearer sk-wrong"))[0] == 401
        assert (await post(http, sandbox, chat(), Authorization="Bearer sk-right"))[0] == 200


async def test_requests_are_remembered_with_their_exact_body_and_masked_key(
    http: aiohttp.ClientSession, sandbox: Sandbox
) -> None:
    body = '{"model": "m",  "messages": [{"role":"user","content":"é\\u00e9"}], "n": 1}'
    assert (await post(http, sandbox, body.encode(), Authorization="Bearer sk-secret", traceparent="00-a"))[0] == 200
    url = sandbox.base_url.removesuffix("/v1") + "/_sandbox/requests"
    async with http.get(url) as response:
        raw = await response.text()
    found = json.loads(raw)
    assert (found["total"], len(found["requests"])) == (1, 1)
    entry = found["requests"][0]
    assert (entry["body"], entry["method"], entry["path"]) == (body, "POST", "/v1/chat/completions")
    assert {"Authorization": "***", "traceparent": "00-a"}.items() <= dict(entry["headers"]).items()
    assert "sk-secret" not in raw
    assert entry["ended"] == "complete"
    async with http.delete(url) as response:
        assert (await response.json())["total"] == 0


async def test_models_are_listed(sdk: openai.AsyncOpenAI) -> None:
    assert "ibex-sandbox" in [model.id async for model in sdk.models.list()]
    assert (await sdk.models.retrieve("gpt-4o")).id == "gpt-4o"
    with pytest.raises(openai.NotFoundError):
        await sdk.models.retrieve("gpt-0")


async def test_another_path_is_unknown(http: aiohttp.ClientSession, sandbox: Sandbox) -> None:
    async with http.get(f"{sandbox.base_url}/nothing") as response:
        assert response.status == 404
        assert response.headers["x-ibex-sandbox"] == "true"


async def test_it_fails_as_often_as_it_is_told(http: aiohttp.ClientSession, sandbox: Sandbox) -> None:
    body = chat(controls={"status": 429, "times": 2, "retry_after": "7"})
    assert [(await post(http, sandbox, body))[0] for _ in range(4)] == [429, 429, 200, 429]
    async with http.post(f"{sandbox.base_url}/chat/completions", json=body) as response:
        assert response.headers["Retry-After"] == "7"


async def test_controls_may_come_as_text_or_in_a_header(http: aiohttp.ClientSession, sandbox: Sandbox) -> None:
    body = chat() | {"metadata": {"sandbox": '{"status": 418}'}}
    assert (await post(http, sandbox, body))[0] == 418
    assert (await post(http, sandbox, chat(), **{"X-Sandbox": '{"status": 503}'}))[0] == 503
    assert (await post(http, sandbox, chat(), **{"X-Sandbox": "{"}))[0] == 400


async def test_a_stream_is_as_long_and_as_wide_as_it_is_told(http: aiohttp.ClientSession, sandbox: Sandbox) -> None:
    events = await stream(http, sandbox, chat(controls={"events": 3, "event_bytes": 10_000, "comments": 2}))
    assert len(events) == 6  # the role, three texts, the reason, [DONE]
    assert [len(event) > 10_000 for event in events] == [False, True, True, True, False, False]
    assert all(event.startswith(b": sandbox\n: sandbox\ndata: ") for event in events[:-1])


async def test_a_stream_can_end_badly(http: aiohttp.ClientSession, sandbox: Sandbox) -> None:
    events = await stream(http, sandbox, chat(controls={"no_done": True}))
    assert b'"finish_reason":"stop"' in events[-1]
    events = await stream(http, sandbox, chat(controls={"error_after": 2}))
    assert len(events) == 3
    assert events[-1].startswith(b'data: {"error":{')
    with pytest.raises(aiohttp.ClientPayloadError):
        await stream(http, sandbox, chat(controls={"cut_after": 2}))
    with pytest.raises(aiohttp.ClientPayloadError):
        await stream(http, sandbox, chat(controls={"cut_at_byte": 300}))
    with pytest.raises(aiohttp.ClientPayloadError):
        await post(http, sandbox, chat(controls={"cut_after": 20}))
    with pytest.raises(aiohttp.ClientConnectionError):
        await post(http, sandbox, chat(controls={"cut_after": -1}))
    assert [entry.ended for entry in sandbox.requests.last()] == ["complete", "complete", "cut", "cut", "cut", "cut"]


@pytest.mark.parametrize(
    "body",
    [
        chat(controls={"hang_after": 1}, stream=True),
        chat(controls={"hang_after": 5}),
        chat(controls={"hang_after": -1}),
    ],
)
async def test_it_can_fall_silent_until_the_client_leaves(
    http: aiohttp.ClientSession, sandbox: Sandbox, body: dict[str, Any]
) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await post(http, sandbox, body)
    while sandbox.requests[0].ended is None:  # noqa: ASYNC110 (the sandbox tells nobody)
        await asyncio.sleep(0.002)
    assert sandbox.requests[0].ended == "client_disconnect"


async def test_answers_can_be_anything(http: aiohttp.ClientSession, sandbox: Sandbox) -> None:
    assert (await post(http, sandbox, chat(controls={"body": "<html>"})))[1] == b"<html>"
    _, raw = await post(http, sandbox, chat(controls={"usage": {"prompt_tokens": -1}, "text": "x"}))
    assert json.loads(raw)["usage"] == {"prompt_tokens": -1}
    assert json.loads(raw)["choices"][0]["message"]["content"] == "x"
    _, raw = await post(http, sandbox, chat(controls={"line_end": "\r\n"}, stream=True))
    assert raw.endswith(b"data: [DONE]\r\n\r\n")
    _, raw = await post(http, sandbox, chat(controls={"piece_bytes": 3, "delay_ms": 1}, stream=True))
    assert raw.endswith(b"data: [DONE]\n\n")


async def send_raw(sandbox: Sandbox, raw: bytes, **controls: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Have it answer with these bytes."""
    asked = {"raw": base64.b64encode(raw).decode(), **controls}
    body = json.dumps(chat(controls=asked)).encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\nHost: s\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    url = urlsplit(sandbox.base_url)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    writer.write(request)
    return reader, writer


ODD = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx\xff\0HTTP/2 garbage"


@pytest.mark.parametrize("piece_bytes", [None, 1])
@pytest.mark.parametrize("end", ["close", "half_close"])
async def test_bytes_are_sent_as_they_are_given(sandbox: Sandbox, end: str, piece_bytes: int | None) -> None:
    reader, writer = await send_raw(sandbox, ODD, raw_end=end, piece_bytes=piece_bytes)
    assert await reader.read() == ODD
    if end == "half_close":
        assert sandbox.open_connections == 1
    writer.close()
    await eventually(lambda: sandbox.open_connections == 0)
    assert sandbox.requests[0].ended == ("complete" if end == "close" else "client_disconnect")


async def test_a_connection_is_kept_after_odd_bytes_if_that_is_asked_for(sandbox: Sandbox) -> None:
    reader, writer = await send_raw(sandbox, ODD, raw_end="keep")
    assert await reader.readexactly(len(ODD)) == ODD
    writer.write(b"GET /v1/models HTTP/1.1\r\nHost: s\r\nConnection: close\r\n\r\n")
    assert (await reader.read()).startswith(b"HTTP/1.1 200 OK\r\n")
    assert sandbox.requests[0].ended == "complete"
    writer.close()


async def test_a_connection_hangs_or_is_reset_if_that_is_asked_for(sandbox: Sandbox) -> None:
    reader, writer = await send_raw(sandbox, ODD, raw_end="hang")
    assert await reader.readexactly(len(ODD)) == ODD
    assert sandbox.requests[0].ended is None
    writer.close()
    await eventually(lambda: sandbox.open_connections == 0)
    reader, writer = await send_raw(sandbox, b"", raw_end="reset")
    with pytest.raises(ConnectionResetError):
        await reader.read()
    assert sandbox.requests[1].ended == "cut"
    writer.close()


async def test_bytes_in_no_base64_are_refused(http: aiohttp.ClientSession, sandbox: Sandbox) -> None:
    assert (await post(http, sandbox, chat(controls={"raw": "no base64!"})))[0] == 400


async def test_it_serves_as_a_process_of_its_own(http: aiohttp.ClientSession) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "ibex.sandbox", "--key", "sk-right"), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        line = (await process.stdout.readline()).decode()
        assert "no model" in line
        async with http.get(line.split()[-1] + "/models", headers={"Authorization": "Bearer sk-right"}) as response:
            assert response.status == 200
    finally:
        process.terminate()
    assert await process.wait() == 0
