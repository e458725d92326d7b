"""The snippets of docs/clients.md whose clients must be installed first."""

import importlib.util
import os
from pathlib import Path

import pytest

from tests.acceptance.conftest import House
from tests.clients.snippets import read_snippets, run_snippet

NODE = os.environ.get("IBEX_TEST_NODE", "")
"""A directory whose node_modules has `openai`, `ai` and `@ai-sdk/openai-compatible`."""


def needs(module: str, name: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"{name} is not installed here: make test-clients")


needs_node = pytest.mark.skipif(not NODE, reason="IBEX_TEST_NODE names no directory with the npm packages")


@pytest.mark.parametrize(
    "client",
    [
        pytest.param("OpenAI, JavaScript", marks=needs_node),
        pytest.param("LangChain", marks=needs("langchain_openai", "LangChain")),
        pytest.param("pydantic-ai", marks=needs("pydantic_ai", "pydantic-ai")),
        pytest.param("Vercel AI SDK", marks=needs_node),
        pytest.param("LiteLLM", marks=needs("litellm", "LiteLLM")),
    ],
)
def test_a_snippet_works_as_shown(house: House, tmp_path: Path, client: str) -> None:
    run_snippet(read_snippets()[client], house, Path(NODE) if NODE else tmp_path)
