"""The error map of the contract, over the shapes servers give their errors."""

import json
from email.utils import formatdate
from time import time
from typing import Any

import pytest

from ibex.errors import InvalidRequest, ModelNotFound, ProviderTimeout, ProviderUnavailable, RateLimited, RequestError
from ibex.providers.refusals import parse_retry_after, read_refusal


def refuse(status: int, body: Any = None, **headers: str) -> RequestError:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return read_refusal(status, {name.replace("_", "-"): value for name, value in headers.items()}, raw).to_error(())


def openai(message: str, **rest: Any) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None, **rest}}


UNKNOWN = openai("The model `x` does not exist", code="model_not_found")


@pytest.mark.parametrize(
    ("status", "body", "kind", "http_status"),
    [
        (400, openai("bad"), InvalidRequest, 400),
        (401, openai("Incorrect API key provided: sk-x"), ProviderUnavailable, 503),
        (402, openai("pay"), InvalidRequest, 402),
        (403, openai("no"), ProviderUnavailable, 503),
        (404, UNKNOWN, ModelNotFound, 404),
        (404, openai("nothing here", param="model"), ModelNotFound, 404),
        (404, {"object": "error", "message": "The model `x` does not exist.", "code": 404}, ModelNotFound, 404),
        (404, {"error": 'model "x" not found, try pulling it first'}, ModelNotFound, 404),
        (404, {"detail": "Not Found"}, ProviderUnavailable, 503),
        (404, b"<html>model</html>", ProviderUnavailable, 503),
        (408, None, ProviderTimeout, 504),
        (409, openai("conflict"), InvalidRequest, 409),
        (413, openai("large"), InvalidRequest, 413),
        (415, None, InvalidRequest, 415),
        (422, {"detail": [{"loc": ["body"], "msg": "field required"}]}, InvalidRequest, 422),
        (429, openai("slow down"), RateLimited, 429),
        (500, None, ProviderUnavailable, 503),
        (502, None, ProviderUnavailable, 503),
        (503, None, ProviderUnavailable, 503),
        (504, None, ProviderTimeout, 504),
        (529, None, ProviderUnavailable, 503),
        (201, None, ProviderUnavailable, 503),
        (204, b"", ProviderUnavailable, 503),
        (302, None, ProviderUnavailable, 503),
        (600, None, ProviderUnavailable, 503),
    ],
)
def test_each_status_becomes_its_error(status: int, body: Any, kind: type[RequestError], http_status: int) -> None:
    error = refuse(status, body)
    assert (type(error), error.http_status) == (kind, http_status)


def test_a_bad_request_says_what_the_provider_said() -> None:
    error = refuse(400, openai("Invalid 'n':\x1b must be positive", param="n"))
    assert (error.message, error.param) == ("Invalid 'n':  must be positive", "n")
    assert refuse(422, {"detail": [{"msg": "field required"}]}).message == '[{"msg":"field required"}]'
    assert refuse(404, UNKNOWN).param == "model"


@pytest.mark.parametrize("status", [401, 403, 500, 503, 404])
def test_what_is_wrong_between_ibex_and_the_provider_is_told_to_nobody(status: int) -> None:
    assert (
        refuse(status, openai("Incorrect key sk-x of org-y", code="z")).message == ProviderUnavailable.default_message()
    )


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff",
        b"null",
        b"[]",
        b'"x"',
        b"{",
        b"[" * 100_000,
        b'{"error": 1}',
        b'{"error": {"message": 5, "param": []}}',
    ],
)
def test_an_error_that_cannot_be_read_is_still_an_error(body: bytes) -> None:
    error = refuse(400, body)
    assert (error.message, error.param) == (InvalidRequest.default_message(), None)


@pytest.mark.parametrize(
    ("value", "passed_on"),
    [
        ("1", "1"),
        ("86400", "86400"),
        ("1.2", "2"),
        ("0", "1"),
        ("86401", "1"),
        ("-1", "1"),
        ("x", "1"),
        ("nan", "1"),
    ],
)
def test_a_sensible_retry_after_is_passed_on_and_a_429_always_has_one(value: str, passed_on: str) -> None:
    assert refuse(429, None, retry_after=value).headers["Retry-After"] == passed_on


def test_a_retry_after_may_be_a_date() -> None:
    found = parse_retry_after(formatdate(time() + 100, usegmt=True))
    assert found is not None
    assert 90 < found <= 101
    assert parse_retry_after(formatdate(time() - 100, usegmt=True)) is None
    assert parse_retry_after(None) is None


@pytest.mark.parametrize(
    ("status", "message", "param", "refuses"),
    [
        (400, "Unrecognized request argument supplied: stream_options", None, True),
        (422, "bad", "stream_options.include_usage", True),
        (400, "bad", None, False),
        (500, "stream_options", None, False),
    ],
)
def test_a_refusal_of_stream_usage_is_recognised(status: int, message: str, param: str | None, refuses: bool) -> None:
    body = json.dumps(openai(message, param=param)).encode()
    assert read_refusal(status, {}, body).refuses_stream_usage is refuses
