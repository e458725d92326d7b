"""The snippets of docs/clients.md that need nothing but curl and the OpenAI SDK."""

from pathlib import Path

import pytest

from tests.acceptance.conftest import House
from tests.clients.snippets import read_snippets, run_snippet


@pytest.mark.parametrize("client", ["curl", "OpenAI, Python"])
def test_a_snippet_works_as_shown(house: House, tmp_path: Path, client: str) -> None:
    run_snippet(read_snippets()[client], house, tmp_path)
