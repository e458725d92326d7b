"""Which paths there are, what each answers, and what else is told to whoever asks for another."""

import json
from typing import Any
from uuid import UUID, uuid4

import pytest

from ibex.domain.identity import Permission
from tests.server.conftest import Edge
from tests.tenants import make_tenant


async def ask(
    edge: Edge, path: str, *, method: str = "GET", data: bytes | None = None, **headers: str | None
) -> tuple[int, dict[str, str], Any]:
    """One request; status, headers (lower-case), and the body as JSON if it is."""
    sent = edge.headers(**headers)
    if data is None:
        del sent["Content-Type"]
    async with edge.http.request(method, edge.url + path, headers=sent, data=data) as response:
        content = await response.read()
        found = {name.lower(): value for name, value in response.headers.items()}
        is_json = found.get("content-type") == "application/json" and content
        return response.status, found, json.loads(content) if is_json else content


async def test_the_organizations_own_path_is_the_chat(edge: Edge) -> None:
    body = json.dumps(edge.body).encode()
    for org_id in (str(edge.tenant.org_id), str(edge.tenant.org_id).upper()):
        status, headers, content = await ask(edge, f"/v1/orgs/{org_id}/chat/completions", method="POST", data=body)

        assert (status, content["choices"][0]["message"]["content"]) == (200, "IBEX_OK")
        assert headers["x-ibex-turn-id"] == str(edge.last_turn().turn_id)


async def test_another_organizations_path_is_forbidden_and_takes_no_place(edge: Edge) -> None:
    other = await make_tenant(edge.admin, "Other")
    own = str(edge.tenant.org_id)
    braced = f"%7B{own}%7D"
    for org_id in (str(other.org_id), str(uuid4()), own.replace("-", ""), braced, "urn:uuid:" + own, "x", own + "0"):
        for path, method, data in (("chat/completions", "POST", b"{}"), ("auth-probe", "GET", None)):
            status, headers, content = await ask(edge, f"/v1/orgs/{org_id}/{path}", method=method, data=data)

            assert (status, content["error"]["code"]) == (403, "INSUFFICIENT_PERMISSIONS"), org_id
            assert "x-ratelimit-limit" not in headers


async def test_a_path_is_judged_only_for_a_token_that_is_known(edge: Edge) -> None:
    status, _, content = await ask(edge, f"/v1/orgs/{uuid4()}/auth-probe", Authorization="Bearer nothing")

    assert (status, content["error"]["code"]) == (401, "INVALID_TOKEN")


async def test_the_probe_tells_who_is_asking(edge: Edge) -> None:
    for path in ("/v1/internal/auth-probe", f"/v1/orgs/{edge.tenant.org_id}/auth-probe"):
        status, _, content = await ask(edge, path)

        assert status == 200
        assert content == {
            "org_id": str(edge.tenant.org_id),
            "agent_id": str(edge.tenant.agent_id),
            "permissions": ["MEMORY_READ", "SESSION_CREATE", "SESSION_READ"],
        }


@pytest.mark.parametrize("edge", [{"rate_limit_rpm": 1}], indirect=True)
async def test_lookups_need_a_token_and_an_agent_and_neither_permissions_nor_places(edge: Edge) -> None:
    _, bearer = await edge.admin.mint_token(edge.tenant.org_id, name="bare", permissions=Permission(0))
    paths = ("/v1/models", "/v1/models/gpt-4o-mini", "/v1/internal/auth-probe")
    for path in paths:
        for _ in range(3):
            assert (await ask(edge, path, Authorization=f"Bearer {bearer}"))[0] == 200
        assert (await ask(edge, path, Authorization=None))[2]["error"]["code"] == "MISSING_TOKEN"
        assert (await ask(edge, path, X_IBEX_Agent_ID=None))[2]["error"]["code"] == "MISSING_AGENT_ID"
        assert (await ask(edge, path, X_IBEX_Agent_ID=str(uuid4())))[2]["error"]["code"] == "AGENT_NOT_AUTHORIZED"

    assert (await edge.chat(headers={"Authorization": f"Bearer {bearer}"}))[0] == 403
    assert (await edge.chat())[0] == 200, "the only place is still free"


@pytest.mark.parametrize("edge", [{"openai_models": ("gpt-4o*",)}], indirect=True)
async def test_models_have_openais_shapes(edge: Edge) -> None:
    status, headers, content = await ask(edge, "/v1/models")
    assert (status, headers["content-type"], content["object"]) == (200, "application/json", "list")
    assert {model["id"] for model in content["data"]} == {"gpt-4o", "gpt-4o-mini"}
    assert all(set(model) == {"id", "object", "created", "owned_by"} for model in content["data"])

    status, _, one = await ask(edge, "/v1/models/gpt-4o%2Dmini")
    assert (status, one) == (200, next(model for model in content["data"] if model["id"] == "gpt-4o-mini"))

    for unknown in ("gpt-4", "no/such/model", "%FF%00"):
        status, headers, content = await ask(edge, f"/v1/models/{unknown}")
        error = content["error"]
        assert (status, error["code"], error["param"]) == (404, "MODEL_NOT_FOUND", "model")


async def test_an_unknown_path_names_those_there_are(edge: Edge) -> None:
    for path in (
        "/",
        "/v1/embeddings",
        "/v1/responses",
        "/v1/chat/completions/",
        "/v1/models/",
        "/v1/orgs//auth-probe",
    ):
        status, _, content = await ask(edge, path)
        message = content["error"]["message"]

        assert (status, content["error"]["code"]) == (404, "NOT_FOUND"), path
        for named in ("/v1/chat/completions", "/v1/orgs/{org_id}/chat/completions", "/v1/models/{id}", "/ready"):
            assert named in message


@pytest.mark.parametrize(
    ("path", "allowed", "methods"),
    [
        ("/v1/chat/completions", "POST", ("GET", "PUT", "DELETE", "OPTIONS", "HEAD")),
        (f"/v1/orgs/{UUID(int=7)}/chat/completions", "POST", ("GET",)),
        ("/v1/models", "GET, HEAD", ("POST",)),
        ("/v1/models/gpt-4o", "GET, HEAD", ("DELETE",)),
        ("/health", "GET, HEAD", ("POST",)),
    ],
)
async def test_another_method_is_told_which_there_are(
    edge: Edge, path: str, allowed: str, methods: tuple[str, ...]
) -> None:
    for method in methods:
        status, headers, content = await ask(edge, path, method=method)

        assert (status, headers["allow"]) == (405, allowed)
        assert method == "HEAD" or content["error"]["code"] == "METHOD_NOT_ALLOWED"


async def test_a_head_is_a_get_without_its_body(edge: Edge) -> None:
    for path in ("/v1/models", "/health", "/v1/internal/auth-probe"):
        _, asked, _ = await ask(edge, path)
        status, headers, content = await ask(edge, path, method="HEAD")

        assert (status, content) == (200, b"")
        assert headers["content-length"] == asked["content-length"]


async def test_metrics_know_routes_and_never_paths(edge: Edge) -> None:
    secret = str(uuid4())
    for path in (f"/v1/orgs/{secret}/auth-probe", f"/v1/models/{secret}", f"/{secret}", "/ready"):
        await ask(edge, path)
    _, _, text = await ask(edge, "/metrics")

    assert secret.encode() not in text
    for label in (b'route="auth_probe"', b'route="model"', b'route="unmatched"', b'route="ready"'):
        assert label in text
