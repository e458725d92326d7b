"""The unmodified OpenAI SDK against a running house: what an engineer does in the first minute."""

from collections.abc import Iterable, Iterator
from typing import Any
from uuid import UUID, uuid4

import openai
import pytest

from ibex.domain.identity import DEV_AGENT_ID, DEV_TOKEN
from tests.acceptance.conftest import House

ASK = [{"role": "user", "content": "Reply with exactly: IBEX_OK"}]


@pytest.fixture
def client(house: House) -> Iterator[openai.OpenAI]:
    headers = {"X-IBEX-Agent-ID": str(DEV_AGENT_ID)}
    with openai.OpenAI(api_key=DEV_TOKEN, base_url=f"{house.url}/v1", default_headers=headers) as client:
        yield client


def test_a_chat_is_answered(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="gpt-4o-mini", messages=ASK)

    assert answer.choices[0].message.content == "IBEX_OK"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert UUID(answer._request_id).version == 7


def test_a_stream_is_answered_without_the_usage_nobody_asked_for(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="gpt-4o-mini", messages=ASK, stream=True)

    chunks = list(stream)

    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "IBEX_OK"
    assert all(chunk.choices for chunk in chunks)
    assert all(chunk.usage is None for chunk in chunks)


def test_a_stream_with_usage_ends_with_it(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="gpt-4o-mini", messages=ASK, stream=True, stream_options={"include_usage": True}
    )

    *_, last = stream

    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens > 0


def test_a_tool_is_called(client: openai.OpenAI) -> None:
    tool = {
        "type": "function",
        "function": {"name": "look_up", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    }
    answer = client.chat.completions.create(
        model="gpt-4o-mini",
        messages=[{"role": "user", "content": "What is the weather in Bern?"}],
        tools=[tool],
        tool_choice={"type": "function", "function": {"name": "look_up"}},
    )

    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    assert calls[0].function.name == "look_up"


def test_raw_headers_carry_the_turn(client: openai.OpenAI) -> None:
    session = f"s-{uuid4()}"
    raw = client.chat.completions.with_raw_response.create(
        model="gpt-4o-mini", messages=ASK, extra_headers={"X-IBEX-Session-ID": session}
    )

    assert raw.headers["x-ibex-session-id"] == session
    assert UUID(raw.headers["x-ibex-turn-id"]).version == 7
    assert int(raw.headers["x-ratelimit-remaining"]) < int(raw.headers["x-ratelimit-limit"])


@pytest.mark.parametrize(
    ("fault", "expected", "code"),
    [
        ({"api_key": "ibex_pat_nonsense"}, openai.AuthenticationError, "INVALID_TOKEN"),
        ({"agent": str(uuid4())}, openai.PermissionDeniedError, "AGENT_NOT_AUTHORIZED"),
        ({"agent": "me"}, openai.BadRequestError, "VALIDATION_ERROR"),
        ({"model": ""}, openai.BadRequestError, "VALIDATION_ERROR"),
        ({"sandbox": {"status": 400}}, openai.BadRequestError, "INVALID_REQUEST"),
        ({"model": "no-such-model-1"}, openai.NotFoundError, "MODEL_NOT_FOUND"),
        ({"sandbox": {"status": 429, "retry_after": "1000"}}, openai.RateLimitError, "RATE_LIMITED"),
        ({"sandbox": {"status": 401}}, openai.InternalServerError, "PROVIDER_UNAVAILABLE"),
    ],
)
def test_an_error_is_the_sdks_right_exception(house: House, fault: dict, expected: type, code: str) -> None:
    headers = {"X-IBEX-Agent-ID": fault.get("agent", str(DEV_AGENT_ID))}
    key = fault.get("api_key", DEV_TOKEN)
    extra = {"metadata": {"sandbox": fault["sandbox"]}} if "sandbox" in fault else {}
    with (
        openai.OpenAI(api_key=key, base_url=f"{house.url}/v1", default_headers=headers, max_retries=0) as client,
        pytest.raises(expected) as caught,
    ):
        client.chat.completions.create(model=fault.get("model", "gpt-4o-mini"), messages=ASK, extra_body=extra)

    error = caught.value
    assert isinstance(error, openai.APIStatusError)
    assert error.body["code"] == code
    assert error.body["request_id"] == error.request_id
    assert DEV_TOKEN not in str(error)


def test_a_broken_stream_raises_and_never_looks_whole(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="gpt-4o-mini",
        messages=[{"role": "user", "content": "Say a lot of words, please, so that there is something to cut."}],
        stream=True,
        extra_body={"metadata": {"sandbox": {"cut_after": 2}}},
    )

    seen: list[Any] = []
    with pytest.raises(openai.APIError):
        _drain(stream, seen)

    assert seen
    assert all(chunk.choices[0].finish_reason is None for chunk in seen)


def _drain(stream: Iterable[Any], seen: list[Any]) -> None:
    """Read to the end; what came before a break is kept."""
    for chunk in stream:
        seen.append(chunk)  # noqa: PERF402
