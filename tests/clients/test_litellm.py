"""LiteLLM's Python SDK as a client of a running house."""

import os
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest

from ibex.domain.identity import DEV_AGENT_ID, DEV_TOKEN
from tests.acceptance.conftest import House

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else the import fetches a price list from the network
litellm = pytest.importorskip("litellm", reason="LiteLLM is not installed here: make test-clients")
openai = pytest.importorskip("openai")
pydantic = pytest.importorskip("pydantic")

LOOK_UP = {
    "type": "function",
    "function": {
        "name": "look_up",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class Place(pydantic.BaseModel):
    city: str
    people: int


@pytest.fixture
def ask(house: House) -> Callable[..., Any]:
    def ask(text: str, **changes: Any) -> Any:
        options = {
            "model": "openai/gpt-4o-mini",
            "messages": [{"role": "user", "content": text}],
            "api_base": f"{house.url}/v1",
            "api_key": DEV_TOKEN,
            "extra_headers": {"X-IBEX-Agent-ID": str(DEV_AGENT_ID)},
            "max_retries": 0,
        }
        return litellm.completion(**options | changes)

    return ask


def test_a_chat_is_answered_in_the_session_of_the_call(
    ask: Callable[..., Any], count_turns: Callable[[str], int]
) -> None:
    session = f"s-{uuid4()}"

    answer = ask(
        "Reply with exactly: IBEX_OK",
        extra_headers={"X-IBEX-Agent-ID": str(DEV_AGENT_ID), "X-IBEX-Session-ID": session},
    )

    assert answer.choices[0].message.content == "IBEX_OK"
    assert answer.usage.completion_tokens > 0
    assert count_turns(session) == 1


def test_a_stream_is_answered(ask: Callable[..., Any]) -> None:
    chunks = list(ask("Reply with exactly: one two three", stream=True, stream_options={"include_usage": True}))

    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "one two three"
    assert chunks[-1].usage.completion_tokens > 0


@pytest.mark.parametrize("is_streaming", [False, True])
def test_a_tool_is_called(ask: Callable[..., Any], is_streaming: bool) -> None:
    answer = ask("What is the weather?", tools=[LOOK_UP], tool_choice="required", stream=is_streaming)
    whole = litellm.stream_chunk_builder(list(answer)) if is_streaming else answer

    (call,) = whole.choices[0].message.tool_calls
    assert call.function.name == "look_up"


def test_a_schema_reaches_the_provider_and_the_answer_is_parsed(
    ask: Callable[..., Any], last_sent: Callable[[], dict[str, Any]]
) -> None:
    answer = ask('Reply with exactly: {"city":"Bern","people":134000}', response_format=Place)

    assert Place.model_validate_json(answer.choices[0].message.content) == Place(city="Bern", people=134000)
    assert last_sent()["response_format"]["json_schema"]["schema"]["required"] == ["city", "people"]


@pytest.mark.parametrize(
    ("changes", "expected", "status"),
    [
        ({"api_key": "ibex_pat_nonsense"}, "AuthenticationError", 401),
        ({"extra_headers": {"X-IBEX-Agent-ID": str(uuid4())}}, "APIError", 403),
        ({"extra_headers": {}}, "BadRequestError", 400),
        ({"model": "openai/no-such-model-1"}, "BadRequestError", 404),
        ({"extra_body": {"metadata": {"sandbox": {"status": 429, "retry_after": "999"}}}}, "RateLimitError", 429),
        ({"extra_body": {"metadata": {"sandbox": {"status": 401}}}}, "ServiceUnavailableError", 503),
    ],
)
def test_an_error_is_litellms_exception_for_it(
    ask: Callable[..., Any], changes: dict, expected: str, status: int
) -> None:
    with pytest.raises(getattr(litellm, expected, litellm.exceptions.APIError)) as caught:
        ask("Hello", **changes)

    assert caught.value.status_code == status


def test_a_broken_stream_raises(ask: Callable[..., Any]) -> None:
    stream = ask("Say many words.", stream=True, extra_body={"metadata": {"sandbox": {"cut_after": 2}}})

    with pytest.raises(openai.APIError, match="before its answer was whole"):
        list(stream)
