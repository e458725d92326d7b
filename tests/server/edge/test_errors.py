"""Every error of the contract, provoked over HTTP: its status, code, type and headers, and no secret in its body."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from ibex.config import Secret
from ibex.domain.identity import Permission
from ibex.errors import RequestError
from ibex.stores.postgres.identity_admin import StatusKind
from tests.server.conftest import Edge
from tests.tenants import make_tenant

Answer = tuple[int, dict[str, str], bytes]
Provocation = Callable[[Edge], Awaitable[Answer]]

PROVIDER_KEY = "sk-of-the-provider"
SECRET_PROMPT = "the launch code is 0000"
AWAY = "127.0.0.1:1"

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    **dict.fromkeys((500, 501, 503, 504), "api_error"),
}
"""Any other status is an `invalid_request_error`."""
RETRYABLE = {"RATE_LIMITED", "REQUEST_TIMEOUT", "IDEMPOTENCY_IN_PROGRESS", "SERVICE_DEGRADED"}


@dataclass(frozen=True)
class Row:
    """One way to an error."""

    name: str
    code: str
    status: int
    provoke: Provocation
    settings: dict[str, Any] = field(default_factory=dict)
    param: str | None = None
    retry_after: str | None = None


def chat(**changes: Any) -> Provocation:
    """A chat request that is wrong in one way."""
    return lambda edge: edge.chat(**{"messages": [{"role": "user", "content": SECRET_PROMPT}], **changes})


def presenting(**headers: str | None) -> Provocation:
    return chat(headers=headers)


def upstream(**controls: Any) -> Provocation:
    """A chat request that the provider fails."""
    return chat(sandbox=controls)


def path(target: str, method: str = "GET") -> Provocation:
    async def provoke(edge: Edge) -> Answer:
        async with edge.http.request(method, edge.url + target, headers=edge.headers()) as response:
            return response.status, lower(response.headers), await response.read()

    return provoke


def raw(head: str, *, then: bytes = b"") -> Provocation:
    """Bytes of a request, whatever they are."""

    async def provoke(edge: Edge) -> Answer:
        reader, writer = await edge.open_raw()
        fields = "".join(f"{name}: {value}\r\n" for name, value in edge.headers().items())
        writer.write(head.replace("FIELDS\r\n", fields).encode("latin-1") + then)
        head_bytes = await reader.readuntil(b"\r\n\r\n")
        lines = head_bytes.decode("latin-1").split("\r\n")
        headers = lower(dict(line.split(": ", 1) for line in lines[1:] if line))
        content = await reader.readexactly(int(headers["content-length"]))
        writer.transport.abort()
        return int(lines[0].split()[1]), headers, content

    return provoke


def minted(*, revoke: bool = False, wait: float = 0, **options: Any) -> Provocation:
    """A chat with a token of its own."""

    async def provoke(edge: Edge) -> Answer:
        row, bearer = await edge.admin.mint_token(edge.tenant.org_id, name="other", **options)
        if revoke:
            await edge.admin.revoke_token(row["token_id"])
        await asyncio.sleep(wait)
        return await presenting(Authorization=f"Bearer {bearer}")(edge)

    return provoke


def with_status(kind: StatusKind, status: str) -> Provocation:
    """A chat of somebody who is not active."""

    async def provoke(edge: Edge) -> Answer:
        tenant = await make_tenant(edge.admin, f"{kind} {status}")
        entity_id: UUID = getattr(tenant, {"organization": "org_id", "user": "user_id", "agent": "agent_id"}[kind])
        await edge.admin.set_status(kind, entity_id, status)
        return await presenting(Authorization=f"Bearer {tenant.bearer}", X_IBEX_Agent_ID=str(tenant.agent_id))(edge)

    return provoke


async def wrong_secret(edge: Edge) -> Answer:
    return await presenting(Authorization=f"Bearer ibex_pat_{edge.tenant.token_id}_{'A' * 43}")(edge)


async def anothers_agent(edge: Edge) -> Answer:
    other = await make_tenant(edge.admin, "Other")
    return await presenting(X_IBEX_Agent_ID=str(other.agent_id))(edge)


async def bound_to_another_agent(edge: Edge) -> Answer:
    agent = await edge.admin.register_agent(edge.tenant.org_id, "another")
    return await minted(agent=agent["agent_id"])(edge)


async def key_with_another_body(edge: Edge) -> Answer:
    await chat(headers={"Idempotency_Key": "reused"})(edge)
    return await chat(headers={"Idempotency_Key": "reused"}, temperature=1)(edge)


async def key_whose_answer_was_too_large(edge: Edge) -> Answer:
    say = [{"role": "user", "content": "Reply with exactly: " + "x" * (600 << 10)}]
    await edge.chat(messages=say, n=2, headers={"Idempotency_Key": "large"})
    return await edge.chat(messages=say, n=2, headers={"Idempotency_Key": "large"})


async def key_that_is_still_running(edge: Edge) -> Answer:
    asked = len(edge.sandbox.requests)
    slow = chat(headers={"Idempotency_Key": "slow"}, sandbox={"delay_ms": 10_000})
    first = asyncio.get_running_loop().create_task(slow(edge))  # type: ignore[arg-type]
    async with asyncio.timeout(20):
        while len(edge.sandbox.requests) == asked:  # noqa: ASYNC110 (another party's state)
            await asyncio.sleep(0.01)
    answer = await slow(edge)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    return answer


async def one_more_than_the_limit(edge: Edge) -> Answer:
    await edge.chat()
    return await chat()(edge)


async def fault_of_our_own(edge: Edge) -> Answer:
    def fail() -> None:
        raise RuntimeError(f"{edge.tenant.bearer} {SECRET_PROMPT}")

    edge.worker.journal.check_room = fail  # type: ignore[method-assign]
    return await chat()(edge)


def lower(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


HOST = "Host: ibex\r\n"
POST = "POST /v1/chat/completions HTTP/1.1\r\n"
TELLTALE = {"message": f"Bad request by {PROVIDER_KEY}: {'x' * 2000}\x07", "code": "bad", "param": "temperature"}

ROWS = [
    Row("no token", "MISSING_TOKEN", 401, presenting(Authorization=None)),
    Row("an empty token", "MISSING_TOKEN", 401, presenting(Authorization="Bearer ")),
    Row("a malformed token", "INVALID_TOKEN", 401, presenting(Authorization="Bearer secret-of-somebody")),
    Row("another scheme", "INVALID_TOKEN", 401, presenting(Authorization="Basic c2VjcmV0")),
    Row("an unknown token", "INVALID_TOKEN", 401, presenting(Authorization=f"Bearer ibex_pat_{uuid4()}_{'A' * 43}")),
    Row("a wrong secret", "INVALID_TOKEN", 401, wrong_secret),
    Row("a revoked token", "INVALID_TOKEN", 401, minted(revoke=True)),
    Row("an expired token", "INVALID_TOKEN", 401, minted(expires_in=timedelta(microseconds=1), wait=0.01)),
    Row("no permissions", "INSUFFICIENT_PERMISSIONS", 403, minted(permissions=Permission.MEMORY_READ)),
    Row("a foreign path", "INSUFFICIENT_PERMISSIONS", 403, path(f"/v1/orgs/{uuid4()}/auth-probe")),
    Row("no agent", "MISSING_AGENT_ID", 400, presenting(X_IBEX_Agent_ID=None)),
    Row("an agent that is no UUID", "VALIDATION_ERROR", 400, presenting(X_IBEX_Agent_ID="7"), param="X-IBEX-Agent-ID"),
    Row(
        "a session that is no name", "VALIDATION_ERROR", 400, presenting(X_IBEX_Session_ID="a b"),
        param="X-IBEX-Session-ID",
    ),
    Row(
        "a key that is too long", "VALIDATION_ERROR", 400, presenting(Idempotency_Key="k" * 257),
        param="Idempotency-Key",
    ),
    Row("no messages", "VALIDATION_ERROR", 400, chat(messages=[]), param="messages"),
    Row("no model", "VALIDATION_ERROR", 400, chat(model=7), param="model"),
    Row("a model given twice", "VALIDATION_ERROR", 400, chat(data=b'{"model":"a","model":"b"}'), param="model"),
    Row("no object", "VALIDATION_ERROR", 400, chat(data=b"[]")),
    Row("no host", "VALIDATION_ERROR", 400, raw(f"{POST}FIELDS\r\nContent-Length: 0\r\n\r\n")),
    Row("an unknown agent", "AGENT_NOT_AUTHORIZED", 403, presenting(X_IBEX_Agent_ID=str(uuid4()))),
    Row("another organization's agent", "AGENT_NOT_AUTHORIZED", 403, anothers_agent),
    Row("a token of another agent", "AGENT_NOT_AUTHORIZED", 403, bound_to_another_agent),
    Row("a paused agent", "AGENT_SUSPENDED", 403, with_status("agent", "paused")),
    Row("a suspended agent", "AGENT_SUSPENDED", 403, with_status("agent", "suspended")),
    Row("an archived agent", "AGENT_SUSPENDED", 403, with_status("agent", "archived")),
    Row("a suspended organization", "ORG_SUSPENDED", 403, with_status("organization", "suspended")),
    Row("a suspended user", "USER_SUSPENDED", 403, with_status("user", "suspended")),
    Row("no JSON", "INVALID_JSON", 400, chat(data=f'{{"{SECRET_PROMPT}'.encode())),
    Row("no UTF-8", "INVALID_JSON", 400, chat(data=b'{"\xff": 1}')),
    Row("too deep", "INVALID_JSON", 400, chat(data=b'{"a":' + b"[" * 200 + b"]" * 200 + b"}")),
    Row(
        "refused by the provider", "INVALID_REQUEST", 400, upstream(status=400, error=TELLTALE),
        param="temperature",
    ),
    Row("too large for the provider", "INVALID_REQUEST", 413, upstream(status=413)),
    Row("a kind the provider refuses", "INVALID_REQUEST", 415, upstream(status=415)),
    Row("not processable", "INVALID_REQUEST", 422, upstream(status=422)),
    Row("an unknown model", "MODEL_NOT_FOUND", 404, chat(model="no-such-model"), param="model"),
    Row("a model that is not listed", "MODEL_NOT_FOUND", 404, path("/v1/models/no-such-model"), param="model"),
    Row("an unknown path", "NOT_FOUND", 404, path("/v1/embeddings", "POST")),
    Row("another method", "METHOD_NOT_ALLOWED", 405, path("/v1/chat/completions")),
    Row("a large body", "PAYLOAD_TOO_LARGE", 413, raw(f"{POST}{HOST}FIELDS\r\nContent-Length: 1048577\r\n\r\n")),
    Row("another type", "UNSUPPORTED_MEDIA_TYPE", 415, presenting(Content_Type="text/plain")),
    Row("a coded body", "UNSUPPORTED_MEDIA_TYPE", 415, presenting(Content_Encoding="br")),
    Row("a large field", "HEADERS_TOO_LARGE", 431, raw(f"{POST}{HOST}X-Large: {'x' * 20_000}\r\n\r\n")),
    Row("a key for another body", "IDEMPOTENCY_KEY_REUSE", 409, key_with_another_body),
    Row("a key of a large answer", "IDEMPOTENCY_KEY_REUSE", 409, key_whose_answer_was_too_large),
    Row("a key in use", "IDEMPOTENCY_IN_PROGRESS", 409, key_that_is_still_running),
    Row("the provider's limit", "RATE_LIMITED", 429, upstream(status=429, retry_after="7"), retry_after="7"),
    Row("the provider's limit without end", "RATE_LIMITED", 429, upstream(status=429), retry_after="1"),
    Row("a bad provider key", "PROVIDER_UNAVAILABLE", 503, upstream(status=401, error=TELLTALE)),
    Row("a provider that forbids", "PROVIDER_UNAVAILABLE", 503, upstream(status=403, error=TELLTALE)),
    Row("a wrong base URL", "PROVIDER_UNAVAILABLE", 503, upstream(status=404, error={"message": "no such page"})),
    Row("a redirect", "PROVIDER_UNAVAILABLE", 503, upstream(status=302, headers={"Location": "http://127.0.0.1:1/"})),
    Row("a provider's fault", "PROVIDER_UNAVAILABLE", 503, upstream(status=500, error=TELLTALE)),
    Row("a busy provider", "PROVIDER_UNAVAILABLE", 503, upstream(status=503, retry_after="9"), retry_after="9"),
    Row("a cut connection", "PROVIDER_UNAVAILABLE", 503, upstream(cut_after=-1)),
    Row("a stream not asked for", "PROVIDER_UNAVAILABLE", 503, upstream(content_type="text/event-stream")),
    Row("a provider's time-out", "PROVIDER_TIMEOUT", 504, upstream(status=408)),
    Row("a gateway's time-out", "PROVIDER_TIMEOUT", 504, upstream(status=504)),
]  # fmt: skip
"""What a server with ordinary settings answers."""

ODD_ROWS = [
    Row(
        "a body that does not come", "REQUEST_TIMEOUT", 408,
        raw(f"{POST}{HOST}FIELDS\r\nContent-Length: 2\r\n\r\n", then=b"{"), {"body_seconds": 0.2},
    ),
    Row(
        "the own limit", "RATE_LIMITED", 429, one_more_than_the_limit, {"rate_limit_rpm": 1},
        retry_after=r"[1-9]|[1-5]\d|60",
    ),
    Row("a model nobody serves", "PROVIDER_NOT_CONFIGURED", 501, chat(), {"openai_models": ("gpt-5*",)}, "model"),
    Row(
        "no provider", "PROVIDER_NOT_CONFIGURED", 501, chat(),
        {"openai_api_key": None, "openai_base_url": "https://api.openai.com/v1"}, "model",
    ),
    Row(
        "no provider's models", "PROVIDER_NOT_CONFIGURED", 501, path("/v1/models"),
        {"openai_api_key": None, "openai_base_url": "https://api.openai.com/v1"},
    ),
    Row("a provider that is away", "PROVIDER_UNAVAILABLE", 503, chat(), {"openai_base_url": f"http://{AWAY}/v1"}),
    Row("models of one away", "PROVIDER_UNAVAILABLE", 503, path("/v1/models"), {"openai_base_url": f"http://{AWAY}"}),
    Row("a slow provider", "PROVIDER_TIMEOUT", 504, upstream(delay_ms=9000), {"provider_first_byte_seconds": 0.1}),
    Row(
        "a token nobody can check", "SERVICE_DEGRADED", 503, chat(),
        {"postgres_dsn": Secret(f"postgresql://ibex_app:hush@{AWAY}/ibex")}, retry_after="1",
    ),
    Row("a full journal", "SERVICE_DEGRADED", 503, chat(), {"journal_min_free_bytes": 1 << 60}),
    Row(
        "a key nobody can keep", "SERVICE_DEGRADED", 503, presenting(Idempotency_Key="k"),
        {"redis_url": Secret(f"redis://{AWAY}")},
    ),
    Row(
        "limits nobody can count", "SERVICE_DEGRADED", 503, chat(),
        {"redis_url": Secret(f"redis://{AWAY}"), "rate_limit_on_outage": "refuse"},
    ),
    Row("a fault of our own", "INTERNAL_ERROR", 500, fault_of_our_own),
]  # fmt: skip
"""What takes a server with settings of its own, or one that is then spoilt."""


async def test_each_error_is_told_as_the_contract_says(edge: Edge, subtests: pytest.Subtests) -> None:
    for row in ROWS:
        with subtests.test(row.name):
            check(edge, row, *await row.provoke(edge))


@pytest.mark.parametrize(
    ("edge", "row"), [pytest.param(row.settings, row, id=row.name) for row in ODD_ROWS], indirect=["edge"]
)
async def test_each_error_of_an_odd_server_is_too(edge: Edge, row: Row) -> None:
    check(edge, row, *await row.provoke(edge))


def check(edge: Edge, row: Row, status: int, headers: dict[str, str], content: bytes) -> None:
    """Everything that is promised of every error."""
    assert headers["content-type"] == "application/json"
    assert set(json.loads(content)) == {"error"}
    error = json.loads(content)["error"]
    assert (status, error["code"]) == (row.status, row.code), error
    assert error["type"] == TYPES.get(status, "invalid_request_error")
    assert {"message", "type", "code", "param", "request_id", "timestamp"} <= set(error)
    assert set(error) <= {"message", "type", "code", "param", "request_id", "timestamp", "field_errors", "docs_url"}
    assert isinstance(error["message"], str)
    assert 1 <= len(error["message"].encode()) <= 1024
    assert error["param"] == row.param
    assert all(set(fault) == {"field", "code", "message"} for fault in error.get("field_errors", ()))
    assert error["request_id"] == headers["x-request-id"] == str(UUID(headers["x-request-id"]))
    assert datetime.fromisoformat(error["timestamp"]).tzinfo is not None
    assert float(headers["x-response-time"]) >= 0
    assert headers.get("x-should-retry") == (None if row.code in RETRYABLE else "false")
    if row.retry_after is None:
        assert "retry-after" not in headers
    else:
        assert re.fullmatch(row.retry_after, headers["retry-after"])
    assert status != 405 or headers["allow"] == "POST"
    for secret in ("ibex_pat_", edge.tenant.bearer, PROVIDER_KEY, SECRET_PROMPT, "hush", "\\u0007"):
        assert secret.encode() not in content


def test_every_code_is_provoked() -> None:
    def subclasses(kind: type[RequestError]) -> set[type[RequestError]]:
        return {kind}.union(*map(subclasses, kind.__subclasses__()))

    known = {(kind.code, kind.status) for kind in subclasses(RequestError)}
    assert {(row.code, row.status) for row in (*ROWS, *ODD_ROWS)} >= known
