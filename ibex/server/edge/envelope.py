"""The one envelope every error wears: what OpenAI's SDKs understand, with ibex's stable codes."""

from datetime import UTC, datetime
from uuid import UUID

import msgspec

from ibex.errors import RequestError


def encode_error(error: RequestError, request_id: UUID) -> bytes:
    """The body of an error response."""
    return msgspec.json.encode({"error": _describe(error, request_id)})


def encode_error_item(error: RequestError, request_id: UUID) -> bytes:
    """The last item of a stream that failed after its first byte."""
    return b"data: " + encode_error(error, request_id) + b"\n\n"


def error_headers(error: RequestError) -> dict[str, str]:
    """The headers an error brings along."""
    headers = {"Content-Type": "application/json", **error.headers}
    if not error.is_retryable:
        headers["x-should-retry"] = "false"
    return headers


def _describe(error: RequestError, request_id: UUID) -> dict[str, object]:
    described: dict[str, object] = {
        "message": error.message,
        "type": error.type,
        "code": error.code,
        "param": error.param,
        "request_id": str(request_id),
        "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
    }
    if error.field_errors:
        described["field_errors"] = [
            {"field": fault.field, "code": fault.code, "message": fault.message} for fault in error.field_errors
        ]
    return described
