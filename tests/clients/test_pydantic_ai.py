"""pydantic-ai's agents against a running house."""

from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest

from ibex.domain.identity import DEV_AGENT_ID, DEV_TOKEN
from tests.acceptance.conftest import House

WHY = "pydantic-ai is not installed here: make test-clients"
pydantic_ai = pytest.importorskip("pydantic_ai", reason=WHY)
capabilities = pytest.importorskip("pydantic_ai.capabilities", reason=WHY)
models = pytest.importorskip("pydantic_ai.models.openai", reason=WHY)
providers = pytest.importorskip("pydantic_ai.providers.openai", reason=WHY)
openai = pytest.importorskip("openai")
pydantic = pytest.importorskip("pydantic")

PLACE = 'Reply with exactly: {"city":"Bern","people":134000}'


class Place(pydantic.BaseModel):
    city: str
    people: int


class ToolsFirst(capabilities.AbstractCapability):
    """Forces a tool call in the first step, since the sandbox calls none of itself."""

    def get_model_settings(self) -> Callable[[Any], dict]:
        return lambda context: {"tool_choice": "required" if context.run_step == 1 else "none"}


@pytest.fixture
def agent(house: House) -> Callable[..., Any]:
    def make(
        name: str = "gpt-4o-mini", *, key: str = DEV_TOKEN, agent_id: object = DEV_AGENT_ID, **options: Any
    ) -> Any:
        client = openai.AsyncOpenAI(
            base_url=f"{house.url}/v1",
            api_key=key,
            default_headers={"X-IBEX-Agent-ID": str(agent_id)},
            max_retries=0,
        )
        model = models.OpenAIChatModel(name, provider=providers.OpenAIProvider(openai_client=client))
        return pydantic_ai.Agent(model, **options)

    return make


async def test_a_chat_is_answered_in_the_session_of_the_run(
    agent: Callable[..., Any], count_turns: Callable[[str], int]
) -> None:
    session = f"s-{uuid4()}"

    run = await agent().run(
        "Reply with exactly: IBEX_OK", model_settings={"extra_headers": {"X-IBEX-Session-ID": session}}
    )

    assert run.output == "IBEX_OK"
    assert run.usage.output_tokens > 0
    assert count_turns(session) == 1


async def test_a_stream_is_answered_with_its_usage(agent: Callable[..., Any]) -> None:
    async with agent().run_stream("Reply with exactly: one two three") as run:
        pieces = [piece async for piece in run.stream_text(delta=True)]

    assert "".join(pieces) == "one two three"
    assert run.usage.output_tokens > 0


@pytest.mark.parametrize("is_streaming", [False, True])
async def test_a_tool_is_called_and_its_result_is_sent_back(
    agent: Callable[..., Any], last_sent: Callable[[], dict[str, Any]], is_streaming: bool
) -> None:
    def look_up(city: str) -> str:
        """Say what the weather is in a city."""
        return f"sunny in {city}"

    helper = agent(tools=[look_up], capabilities=[ToolsFirst()])
    if is_streaming:
        async with helper.run_stream("Reply with exactly: fine") as run:
            output = await run.get_output()
    else:
        output = (await helper.run("Reply with exactly: fine")).output

    assert output == "fine"
    assert [message["role"] for message in last_sent()["messages"]] == ["user", "assistant", "tool"]


async def test_an_output_type_is_filled_by_a_tool_call(agent: Callable[..., Any]) -> None:
    assert isinstance((await agent(output_type=Place).run("Where?")).output, Place)


async def test_a_schema_reaches_the_provider_and_the_answer_is_parsed(
    agent: Callable[..., Any], last_sent: Callable[[], dict[str, Any]]
) -> None:
    run = await agent(output_type=pydantic_ai.NativeOutput(Place)).run(PLACE)

    assert run.output == Place(city="Bern", people=134000)
    assert last_sent()["response_format"]["json_schema"]["schema"]["required"] == ["city", "people"]


@pytest.mark.parametrize(
    ("options", "status", "code"),
    [
        ({"key": "ibex_pat_nonsense"}, 401, "INVALID_TOKEN"),
        ({"agent_id": uuid4()}, 403, "AGENT_NOT_AUTHORIZED"),
        ({"name": "no-such-model-1"}, 404, "MODEL_NOT_FOUND"),
    ],
)
async def test_an_error_is_the_right_exception(
    agent: Callable[..., Any], options: dict, status: int, code: str
) -> None:
    with pytest.raises(pydantic_ai.ModelHTTPError) as caught:
        await agent(**options).run("Hello")

    assert (caught.value.status_code, caught.value.body["code"]) == (status, code)


async def test_a_broken_stream_raises(agent: Callable[..., Any]) -> None:
    settings = {"extra_body": {"metadata": {"sandbox": {"cut_after": 2}}}}

    raised = (pydantic_ai.ModelAPIError, openai.APIError)  # older versions let the SDK's own through
    with pytest.raises(raised, match="before its answer was whole"):
        async with agent().run_stream("Say many words.", model_settings=settings) as run:
            await run.get_output()
