"""The OpenAPI description of ibex's HTTP interface, as `write_reference.py` writes it to docs/openapi.json."""

from collections.abc import Iterator
from typing import Any

from ibex import __version__
from ibex.errors import RequestError

Json = dict[str, Any]

EVERYWHERE = ("VALIDATION_ERROR", "HEADERS_TOO_LARGE", "REQUEST_TIMEOUT", "INTERNAL_ERROR")
"""Codes with which the edge answers on any path."""
IDENTITY = (
    "MISSING_TOKEN", "INVALID_TOKEN", "INSUFFICIENT_PERMISSIONS", "MISSING_AGENT_ID", "AGENT_NOT_AUTHORIZED",
    "AGENT_SUSPENDED", "ORG_SUSPENDED", "USER_SUSPENDED", "RATE_LIMITED", "SERVICE_DEGRADED",
)  # fmt: skip
"""Codes of every path that needs a token; RATE_LIMITED is there for look-ups of unknown tokens."""
PROVIDER = ("PROVIDER_NOT_CONFIGURED", "PROVIDER_UNAVAILABLE", "PROVIDER_TIMEOUT")
CHAT = (
    "INVALID_JSON", "INVALID_REQUEST", "MODEL_NOT_FOUND", "IDEMPOTENCY_KEY_REUSE", "IDEMPOTENCY_IN_PROGRESS",
    "PAYLOAD_TOO_LARGE", "UNSUPPORTED_MEDIA_TYPE",
)  # fmt: skip

PASSED_ON = (409, 413, 415, 431)
"""Statuses of ibex's own that a provider's refusal may have as well."""


def describe() -> Json:
    """The whole document."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "ibex",
            "version": __version__,
            "summary": "OpenAI's chat completions and models, for the agents of many organizations.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "http://127.0.0.1:8080", "description": "`ibexctl serve` as it comes"}],
        "security": [{"token": [], "agent": []}],
        "paths": dict(_paths()),
        "components": {
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer", "description": "What `ibexctl token mint` shows once."},
                "agent": {"type": "apiKey", "in": "header", "name": "X-IBEX-Agent-ID", "description": "A UUID."},
            },
            "parameters": _parameters(),
            "headers": _headers(),
            "schemas": _schemas(),
        },
    }


def _paths() -> Iterator[tuple[str, Json]]:
    org = {"parameters": [_ref("parameters", "org_id")]}
    probe = _operation("authProbe", "Who is asking", _json("Who", "Who is asking, as ibex sees it."), *IDENTITY)
    yield "/v1/chat/completions", {"post": _chat("createChatCompletion")}
    yield "/v1/orgs/{org_id}/chat/completions", {**org, "post": _chat("createChatCompletionInOrganization")}
    yield (
        "/v1/models",
        {
            "get": _operation(
                "listModels", "The models there are", _json("Models", "OpenAI's list."), *IDENTITY, *PROVIDER
            )
        },
    )
    yield (
        "/v1/models/{id}",
        {
            "parameters": [_ref("parameters", "model_id")],
            "get": _operation(
                "retrieveModel", "One model", _json("Model", "The model."), *IDENTITY, *PROVIDER, "MODEL_NOT_FOUND"
            ),
        },
    )
    yield "/v1/internal/auth-probe", {"get": probe}
    yield "/v1/orgs/{org_id}/auth-probe", {**org, "get": {**probe, "operationId": "authProbeInOrganization"}}
    yield "/health", {"get": _open("health", "Whether the process lives", _json("Health", "It does."))}
    ready = _open("ready", "Whether it can serve", _json("Readiness", "It serves those it knows, at least."))
    ready["responses"]["503"] = _json("Readiness", "It is draining, its journal takes no turn, or it can serve nobody.")
    yield "/ready", {"get": ready}
    text = {"description": "Prometheus' text format.", "content": {"text/plain": {"schema": {"type": "string"}}}}
    yield (
        "/metrics",
        {
            "get": {
                **_open("metrics", "The whole node's metrics", {**text, "headers": _common_headers()}),
                "description": "On this port in development; elsewhere on a port of its own, `IBEX_METRICS_PORT`.",
            }
        },
    )


def _chat(operation_id: str) -> Json:
    answer = {
        "description": "The provider's reply, byte for byte; a stream is `data:` items and a last `data: [DONE]`.",
        "headers": {**_common_headers(), **_header_refs("X-IBEX-Turn-ID", "X-IBEX-Session-ID", "X-IBEX-Auth-Cached"),
                    **_header_refs("X-IBEX-Replayed", "X-Provider-Request-ID", "openai-processing-ms"), **_limits()},
        "content": {"application/json": {"schema": _ref("schemas", "Completion")}, "text/event-stream": {}},
    }  # fmt: skip
    operation = _operation(operation_id, "Chat", answer, *IDENTITY, *PROVIDER, *CHAT, passes_on=PASSED_ON)
    operation["responses"]["4XX"] = {
        **_error(("INVALID_REQUEST",)),
        "description": "`INVALID_REQUEST`: another status of the provider's.",
    }
    names = ("session_id", "idempotency_key", "openai_beta")
    return {
        **operation,
        "description": "Fields that ibex does not act on reach the provider as the client wrote them.",
        "parameters": [*operation["parameters"], *(_ref("parameters", name) for name in names)],
        "requestBody": {"required": True, "content": {"application/json": {"schema": _ref("schemas", "ChatRequest")}}},
    }


def _operation(operation_id: str, summary: str, answer: Json, *codes: str, passes_on: tuple[int, ...] = ()) -> Json:
    found: dict[int, list[str]] = {status: ["INVALID_REQUEST"] for status in passes_on}
    for code in dict.fromkeys((*EVERYWHERE, *codes)):
        found.setdefault(_statuses()[code], []).append(code)
    return {
        "operationId": operation_id,
        "summary": summary,
        "parameters": [_ref("parameters", "request_id"), _ref("parameters", "traceparent")],
        "responses": {"200": answer, **{str(status): _error(tuple(of)) for status, of in sorted(found.items())}},
    }


def _open(operation_id: str, summary: str, answer: Json) -> Json:
    """An operation that needs nothing."""
    return {**_operation(operation_id, summary, answer), "security": []}


def _json(schema: str, description: str) -> Json:
    return {
        "description": description,
        "headers": _common_headers(),
        "content": {"application/json": {"schema": _ref("schemas", schema)}},
    }


def _error(codes: tuple[str, ...]) -> Json:
    error = {
        "allOf": [
            _ref("schemas", "Error"),
            {"properties": {"error": {"properties": {"code": {"enum": list(codes)}}}}},
        ]
    }
    headers = {**_common_headers(), **_header_refs("x-should-retry", "Retry-After")}
    if "RATE_LIMITED" in codes:
        headers |= _limits()
    description = ", ".join(f"`{code}`" for code in codes)
    return {"description": description, "headers": headers, "content": {"application/json": {"schema": error}}}


def _statuses() -> dict[str, int]:
    def below(kind: type[RequestError]) -> Iterator[type[RequestError]]:
        for child in kind.__subclasses__():
            yield child
            yield from below(child)

    return {kind.code: kind.status for kind in below(RequestError)}


def _ref(section: str, name: str) -> Json:
    return {"$ref": f"#/components/{section}/{name}"}


def _header_refs(*names: str) -> Json:
    return {name: _ref("headers", name) for name in names}


def _common_headers() -> Json:
    return _header_refs("X-Request-ID", "X-Response-Time", "X-Trace-ID")


def _limits() -> Json:
    return _header_refs("X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset")


def _parameters() -> Json:
    def header(name: str, description: str, schema: Json) -> Json:
        return {"name": name, "in": "header", "description": description, "schema": {"type": "string", **schema}}

    def in_path(name: str, description: str, schema: Json) -> Json:
        schema = {"type": "string", **schema}
        return {"name": name, "in": "path", "required": True, "description": description, "schema": schema}

    session = "The conversation this turn belongs to; a new one without it."
    key = "The same key and body within 24 h: the first answer again, and no second call."
    request_id = "Kept if it is a UUID of version 4 or 7, else replaced."
    return {
        "org_id": in_path("org_id", "The token's own organization.", {"format": "uuid"}),
        "model_id": in_path("id", "A model's id; it may hold slashes.", {"minLength": 1}),
        "request_id": header("X-Request-ID", request_id, {}),
        "traceparent": header("traceparent", "W3C trace context, which goes on to the provider.", {}),
        "session_id": header("X-IBEX-Session-ID", session, {"pattern": "^[A-Za-z0-9._:-]{1,64}$"}),
        "idempotency_key": header("Idempotency-Key", key, {"pattern": "^[!-~]([ -~]{0,254}[!-~])?$"}),
        "openai_beta": header("OpenAI-Beta", "Goes on to the provider.", {}),
    }


def _headers() -> Json:
    def header(description: str, **schema: Any) -> Json:
        return {"description": description, "schema": {"type": "string", **schema}}

    return {
        "X-Request-ID": header("Finds this request in the server's log; may be the client's own.", format="uuid"),
        "X-Response-Time": header("Milliseconds until the head left.", pattern=r"^[0-9]+\.[0-9]{3}$"),
        "X-Trace-ID": header("The trace this request belongs to.", pattern="^[0-9a-f]{32}$"),
        "X-IBEX-Turn-ID": header("The key of this turn in checkpoints and traces.", format="uuid"),
        "X-IBEX-Session-ID": header("The session, minted when none was named.", pattern="^[A-Za-z0-9._:-]{1,64}$"),
        "X-IBEX-Auth-Cached": header("There when the caller was known already.", const="true"),
        "X-IBEX-Replayed": header("There when an Idempotency-Key gave the first answer again.", const="true"),
        "X-Provider-Request-ID": header("The provider's own id of its call."),
        "openai-processing-ms": header("What the provider says it took."),
        "X-RateLimit-Limit": header("Requests a minute of the tightest scope.", pattern="^[0-9]+$"),
        "X-RateLimit-Remaining": header("How many of them are left.", pattern="^[0-9]+$"),
        "X-RateLimit-Reset": header("When the next place frees (Unix seconds).", pattern="^[0-9]+$"),
        "Retry-After": header("Seconds to wait; with every 429.", pattern="^[0-9]+$"),
        "x-should-retry": header("`false` where the same request cannot succeed.", const="false"),
    }


def _schemas() -> Json:
    text: Json = {"type": "string"}
    nullable: Json = {"type": ["string", "null"]}
    fault = _object({"field": text, "code": text, "message": text})
    error = _object(
        {
            "message": text,
            "type": {"enum": sorted({kind.type for kind in (RequestError, *RequestError.__subclasses__())})},
            "code": {"enum": sorted(_statuses())},
            "param": nullable,
            "request_id": {"type": "string", "format": "uuid"},
            "timestamp": {"type": "string", "format": "date-time"},
        },
        field_errors={"type": "array", "items": fault},
        docs_url=text,
    )
    check = _object(
        {"status": {"enum": ["ok", "degraded", "unhealthy"]}, "latency_ms": {"type": "number", "minimum": 0}},
        message=text,
    )
    model = _object(
        {"id": text, "object": {"const": "model"}, "created": {"type": "integer", "minimum": 0}, "owned_by": text}
    )
    uuid = {"type": "string", "format": "uuid"}
    return {
        "ChatRequest": _chat_request(),
        "Completion": {"type": "object", "description": "OpenAI's completion, as the provider sent it."},
        "Model": model,
        "Models": _object({"object": {"const": "list"}, "data": {"type": "array", "items": _ref("schemas", "Model")}}),
        "Who": _object({"org_id": uuid, "agent_id": uuid, "permissions": {"type": "array", "items": text}}),
        "Health": _object({"status": {"const": "ok"}}),
        "Readiness": _object(
            {
                "status": {"enum": ["ok", "degraded", "unhealthy"]},
                "checks": {"type": "object", "additionalProperties": check},
            }
        ),
        "Error": _object({"error": error}),
    }


def _object(required: Json, **optional: Any) -> Json:
    return {
        "type": "object",
        "properties": {**required, **optional},
        "required": list(required),
        "additionalProperties": False,
    }


def _chat_request() -> Json:
    """What ibex itself reads; everything else is the provider's to judge."""
    return {
        "type": "object",
        "properties": {
            "model": {"type": "string", "minLength": 1, "maxLength": 256},
            "messages": {
                "type": "array",
                "minItems": 1,
                "maxItems": 1000,
                "items": {"type": "object", "properties": {"role": {"type": "string"}}, "required": ["role"]},
            },
            "stream": {"type": ["boolean", "null"]},
            "stream_options": {
                "type": ["object", "null"],
                "properties": {"include_usage": {"type": ["boolean", "null"]}},
            },
        },
        "required": ["model", "messages"],
    }
