"""The catalog of models over real providers: one question for all who ask, and the last answer while they are away."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from ibex.config import Secret, Settings
from ibex.errors import ModelNotFound, ProviderNotConfigured, ProviderUnavailable, RequestError
from ibex.pipeline.models import ModelCatalog
from ibex.providers.openai import OpenAI
from ibex.telemetry import Metrics
from tests.providers.upstream import Talk, Upstream, serve_script

ANY = ("*",)


def entry(model_id: Any, **fields: Any) -> dict[str, Any]:
    return {"id": model_id, "object": "model", "created": 1700000000, "owned_by": "somebody", **fields}


def answer(content: Any, status: int = 200) -> bytes:
    body = json.dumps(content).encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


LIST = answer({"object": "list", "data": [entry("gpt-4o"), entry("gpt-4o-mini"), entry("whisper-1")]})


@asynccontextmanager
async def catalog(
    answers: Sequence[bytes], *, globs: tuple[str, ...] = ANY, fresh_seconds: float = 300.0
) -> AsyncIterator[tuple[ModelCatalog, Upstream]]:
    """A catalog of one provider, which gives these answers in turn, and the last one ever after."""
    left = list(answers)

    async def script(talk: Talk) -> None:
        while True:
            await talk.hear()
            await talk.say(left.pop(0) if len(left) > 1 else left[0])

    async with serve_script(script) as upstream:
        settings = Settings(openai_models=globs, provider_retries=0)
        provider = OpenAI(settings, Metrics(), base_url=upstream.base_url, api_key=Secret("sk-key"))
        yield ModelCatalog((provider,), fresh_seconds=fresh_seconds), upstream
        await provider.close()


async def ids(models: ModelCatalog) -> list[str]:
    return [model.id for model in await models.list_models()]


async def test_the_list_is_the_providers_own_where_the_globs_match() -> None:
    async with catalog([LIST], globs=("gpt-*",)) as (models, upstream):
        assert await ids(models) == ["gpt-4o", "gpt-4o-mini"]
        assert (await models.find("gpt-4o")).owned_by == "somebody"
        for unknown in ("whisper-1", "nothing"):
            with pytest.raises(ModelNotFound):
                await models.find(unknown)
        assert len(upstream.requests) == 1
        assert upstream.requests[0].startswith(b"GET /v1/models HTTP/1.1\r\n")
        assert b"\r\nAuthorization: Bearer sk-key\r\n" in upstream.requests[0]


async def test_all_who_ask_at_once_wait_for_one_answer_and_who_leaves_takes_it_from_nobody() -> None:
    async with catalog([LIST]) as (models, upstream):
        asking = [asyncio.get_running_loop().create_task(ids(models)) for _ in range(20)]
        await asyncio.sleep(0)
        asking[0].cancel()
        outcomes = await asyncio.gather(*asking, return_exceptions=True)

        assert isinstance(outcomes[0], asyncio.CancelledError)
        assert outcomes[1:] == [["gpt-4o", "gpt-4o-mini", "whisper-1"]] * 19
        assert len(upstream.requests) == 1


async def test_an_old_list_is_asked_for_again() -> None:
    async with catalog([LIST, answer({"data": [entry("gpt-5")]})], fresh_seconds=0) as (models, _):
        assert len(await ids(models)) == 3
        assert await ids(models) == ["gpt-5"]


async def test_the_last_known_list_is_given_while_the_provider_is_away_which_is_then_left_alone() -> None:
    async with catalog([LIST, answer({}, 500)], fresh_seconds=0) as (models, upstream):
        for _ in range(5):
            assert len(await ids(models)) == 3
        assert len(upstream.requests) == 2


@pytest.mark.parametrize(
    "refusal",
    [
        answer({}, 500),
        answer({"error": {"message": "bad key"}}, 401),
        answer({"error": {"message": "no such path"}}, 404),
        answer({"error": {"message": "what model?"}}, 404),
        answer({"error": {"message": "bad request"}}, 400),
        answer({"error": {"message": "not allowed"}}, 405),
        answer({"data": "none"}),
        answer(["gpt-4o"]),
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n<a/>",
    ],
)
async def test_a_list_that_was_never_told_is_no_fault_of_the_clients(refusal: bytes) -> None:
    async with catalog([refusal, LIST]) as (models, _):
        with pytest.raises(ProviderUnavailable):
            await models.list_models()
        assert len(await ids(models)) == 3, "it is asked again at once when there is nothing to give"


async def test_a_providers_limit_is_passed_on() -> None:
    async with catalog([answer({}, 429)]) as (models, _):
        with pytest.raises(RequestError) as caught:
            await models.list_models()
        assert caught.value.code == "RATE_LIMITED"


async def test_malformed_entries_are_left_out_and_malformed_fields_replaced() -> None:
    entries = [
        None, "gpt", {}, entry(7), entry(""), entry("a\nb"), entry("x" * 257),
        entry("good", created=-1, owned_by={}), entry("good too", created=1), entry("good", created=5), entry("é"),
        entry("true", created=True, owned_by="a\r\nb"),
    ]  # fmt: skip
    async with catalog([answer({"data": entries})]) as (models, _):
        found = [(model.id, model.created, model.owned_by) for model in await models.list_models()]
        assert found == [("good", 5, "somebody"), ("true", 0, "openai")]


async def test_without_a_provider_there_is_nothing_to_list() -> None:
    with pytest.raises(ProviderNotConfigured, match="OPENAI_API_KEY"):
        await ModelCatalog(()).list_models()
