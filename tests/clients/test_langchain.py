"""LangChain's ChatOpenAI against a running house."""

from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest

from ibex.domain.identity import DEV_AGENT_ID, DEV_TOKEN
from tests.acceptance.conftest import House

WHY = "LangChain is not installed here: make test-clients"
langchain_openai = pytest.importorskip("langchain_openai", reason=WHY)
messages = pytest.importorskip("langchain_core.messages", reason=WHY)
openai = pytest.importorskip("openai")
pydantic = pytest.importorskip("pydantic")


class Place(pydantic.BaseModel):
    city: str
    people: int


def look_up(city: str) -> str:
    """Say what the weather is in a city."""
    return f"sunny in {city}"


@pytest.fixture
def chat_model(house: House) -> Callable[..., Any]:
    def make(**changes: Any) -> Any:
        options = {
            "model": "gpt-4o-mini",
            "base_url": f"{house.url}/v1",
            "api_key": DEV_TOKEN,
            "default_headers": {"X-IBEX-Agent-ID": str(DEV_AGENT_ID)},
            "max_retries": 0,
            "include_response_headers": True,
        }
        return langchain_openai.ChatOpenAI(**options | changes)

    return make


def test_a_chat_is_answered_in_the_session_of_the_call(chat_model: Callable[..., Any]) -> None:
    session = f"s-{uuid4()}"

    answer = chat_model().invoke("Reply with exactly: IBEX_OK", extra_headers={"X-IBEX-Session-ID": session})

    assert answer.content == "IBEX_OK"
    assert answer.usage_metadata["output_tokens"] > 0
    assert answer.response_metadata["headers"]["x-ibex-session-id"] == session


async def test_a_chat_is_answered_asynchronously(chat_model: Callable[..., Any]) -> None:
    assert (await chat_model().ainvoke("Reply with exactly: IBEX_OK")).content == "IBEX_OK"


@pytest.mark.parametrize("with_usage", [False, True])
def test_a_stream_has_usage_only_if_asked(chat_model: Callable[..., Any], with_usage: bool) -> None:
    chunks = list(chat_model(stream_usage=with_usage).stream("Reply with exactly: one two three"))

    assert "".join(chunk.content for chunk in chunks) == "one two three"
    assert len([chunk for chunk in chunks if chunk.usage_metadata]) == (1 if with_usage else 0)


def test_a_tool_is_called_and_its_result_is_sent_back(chat_model: Callable[..., Any]) -> None:
    question = messages.HumanMessage("What is the weather?")

    call = chat_model().bind_tools([look_up], tool_choice="look_up").invoke([question])
    (wanted,) = call.tool_calls
    result = messages.ToolMessage(look_up(**wanted["args"]), tool_call_id=wanted["id"])
    answer = chat_model().invoke([question, call, result, messages.HumanMessage("Reply with exactly: sunny")])

    assert wanted["name"] == "look_up"
    assert answer.content == "sunny"


def test_a_schema_reaches_the_provider_and_the_answer_is_parsed(
    chat_model: Callable[..., Any], last_sent: Callable[[], dict[str, Any]]
) -> None:
    structured = chat_model().with_structured_output(Place, method="json_schema")

    assert structured.invoke('Reply with exactly: {"city":"Bern","people":134000}') == Place(city="Bern", people=134000)
    assert last_sent()["response_format"]["json_schema"]["schema"]["required"] == ["city", "people"]


@pytest.mark.parametrize(
    ("changes", "expected", "code"),
    [
        ({"api_key": "ibex_pat_nonsense"}, "AuthenticationError", "INVALID_TOKEN"),
        ({"default_headers": {"X-IBEX-Agent-ID": str(uuid4())}}, "PermissionDeniedError", "AGENT_NOT_AUTHORIZED"),
        ({"default_headers": {}}, "BadRequestError", "MISSING_AGENT_ID"),
        ({"model": "no-such-model-1"}, "NotFoundError", "MODEL_NOT_FOUND"),
        ({"extra_body": {"metadata": {"sandbox": {"status": 429, "retry_after": "999"}}}}, "RateLimitError", None),
    ],
)
def test_an_error_is_the_right_exception(
    chat_model: Callable[..., Any], changes: dict, expected: str, code: str | None
) -> None:
    with pytest.raises(getattr(openai, expected)) as caught:
        chat_model(**changes).invoke("Hello")

    assert caught.value.body["code"] == (code or "RATE_LIMITED")


def test_a_broken_stream_raises(chat_model: Callable[..., Any]) -> None:
    cut = chat_model(extra_body={"metadata": {"sandbox": {"cut_after": 2}}})

    with pytest.raises(openai.APIError, match="before its answer was whole"):
        list(cut.stream("Say many words."))
