"""docs/openapi.json says what is served: every route and method, every code where it can occur, and nothing else."""

import json
import re
from pathlib import Path
from typing import Any, cast

import pytest

from ibex.config import Settings
from ibex.server.edge.lookups import Lookups
from ibex.server.edge.ops import Operations
from ibex.server.edge.routes import Routes
from tests.server.edge.test_errors import ODD_ROWS, ROWS

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = json.loads((ROOT / "docs" / "openapi.json").read_text())
CHAT = DOCUMENT["paths"]["/v1/chat/completions"]["post"]


@pytest.fixture
def routes() -> Routes:
    """The table as it is served; none of its handlers is called."""
    absent = cast("Any", Operations.__new__(Operations))
    return Routes(Settings(), absent, Lookups.__new__(Lookups), absent)


def test_every_route_is_described_and_no_other(routes: Routes) -> None:
    served = {(route.template, route.method.lower()) for route in routes}
    methods = {"get", "put", "post", "delete", "options", "head", "patch", "trace"}
    described = {(path, method) for path, item in DOCUMENT["paths"].items() for method in methods & item.keys()}

    assert described == served


def test_every_route_is_in_the_page(routes: Routes) -> None:
    page = (ROOT / "docs" / "api.md").read_text()

    assert [route.template for route in routes if f"`{route.method} {route.template}`" not in page] == []


def test_every_error_that_is_provoked_is_described() -> None:
    for row in (*ROWS, *ODD_ROWS):
        responses = CHAT["responses"]
        if row.code in {"NOT_FOUND", "METHOD_NOT_ALLOWED"}:
            continue  # of paths and methods that the document does not have
        described = responses.get(str(row.status), responses["4XX"])
        (_, narrowed) = described["content"]["application/json"]["schema"]["allOf"]
        assert row.code in narrowed["properties"]["error"]["properties"]["code"]["enum"], row.name


def test_every_reference_leads_somewhere_and_every_component_is_used() -> None:
    text = json.dumps(DOCUMENT)
    named = set(re.findall(r'"#/components/(\w+)/([\w-]+)"', text))
    there = {
        (section, name)
        for section, components in DOCUMENT["components"].items()
        for name in components
        if section != "securitySchemes"
    }

    assert named == there
