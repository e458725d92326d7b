"""Everything that can go wrong in ibex, with its HTTP status, its stable code and its default message.

A class's docstring is the message a client reads when none is given::

    IbexError
    ├── RequestError                 becomes a response: status, type, code
    │   ├── MissingToken, InvalidToken                                401
    │   ├── InsufficientPermissions, AgentNotAuthorized               403
    │   ├── AgentSuspended, OrgSuspended, UserSuspended               403
    │   ├── MissingAgentId, ValidationFailed, InvalidJson             400
    │   ├── InvalidRequest                                            400 or the provider's own 4xx
    │   ├── ModelNotFound, NotFound                                   404
    │   ├── MethodNotAllowed                                          405
    │   ├── RequestTimeout                                            408
    │   ├── IdempotencyKeyReuse, IdempotencyInProgress                409
    │   ├── PayloadTooLarge, UnsupportedMediaType, HeadersTooLarge    413, 415, 431
    │   ├── RateLimited                                               429
    │   ├── InternalError, ProviderNotConfigured                      500, 501
    │   ├── ProviderUnavailable, ProviderTimeout                      503, 504
    │   └── ServiceDegraded                                           503
    ├── StoreError                   a store did not do what it was asked
    │   ├── StoreUnavailable             away, refused, too slow: the same call may succeed later
    │   └── StoreRefused                 it answered no: this call can never succeed
    └── OperatorError                for the person at the command line: what happened, what to do next
        ├── ConfigurationError, SchemaMismatch, DataDirectoryLocked
        ├── EngineFailed, EmbeddedExtraMissing, UnknownEntity
        └── ServerNotRunning
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar


class IbexError(Exception):
    """Something went wrong in ibex."""

    def __init__(self, message: str | None = None) -> None:
        self.message = message or type(self).default_message()
        super().__init__(self.message)

    @classmethod
    def default_message(cls) -> str:
        """The first paragraph of the class's docstring, as one line."""
        return " ".join((cls.__doc__ or "").split("\n\n")[0].split())


@dataclass(frozen=True, slots=True)
class FieldError:
    """One fault of one field of a request, as the envelope's `field_errors` lists it."""

    field: str
    code: str
    message: str


class RequestError(IbexError):
    """The request could not be served."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "api_error"
    code: ClassVar[str] = "INTERNAL_ERROR"
    is_retryable: ClassVar[bool] = False
    """Whether the same request may succeed later; where not, the response carries `x-should-retry: false`."""
    attempts: int = 0
    """How often a provider was asked before this came of it."""

    def __init__(
        self,
        message: str | None = None,
        *,
        param: str | None = None,
        field_errors: Sequence[FieldError] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.param = param
        self.field_errors = tuple(field_errors)
        self.headers = dict(headers or {})

    @property
    def http_status(self) -> int:
        """The status of the response: the class's, unless the provider's own is passed on."""
        return type(self).status


class MissingToken(RequestError):
    """No bearer token was sent. Send `Authorization: Bearer <token>`."""

    status, type, code = 401, "authentication_error", "MISSING_TOKEN"


class InvalidToken(RequestError):
    """The bearer token is not valid."""

    status, type, code = 401, "authentication_error", "INVALID_TOKEN"


class InsufficientPermissions(RequestError):
    """The token does not permit this."""

    status, type, code = 403, "permission_error", "INSUFFICIENT_PERMISSIONS"


class AgentNotAuthorized(RequestError):
    """The token may not act for this agent."""

    status, type, code = 403, "permission_error", "AGENT_NOT_AUTHORIZED"


class AgentSuspended(RequestError):
    """The agent is not active."""

    status, type, code = 403, "permission_error", "AGENT_SUSPENDED"


class OrgSuspended(RequestError):
    """The organization is not active."""

    status, type, code = 403, "permission_error", "ORG_SUSPENDED"


class UserSuspended(RequestError):
    """The user this token belongs to is not active."""

    status, type, code = 403, "permission_error", "USER_SUSPENDED"


class MissingAgentId(RequestError):
    """No agent was named. Send `X-IBEX-Agent-ID: <agent id>`."""

    status, type, code = 400, "invalid_request_error", "MISSING_AGENT_ID"


class ValidationFailed(RequestError):
    """A field of the request is not valid."""

    status, type, code = 400, "invalid_request_error", "VALIDATION_ERROR"


class InvalidJson(RequestError):
    """The body is not valid JSON."""

    status, type, code = 400, "invalid_request_error", "INVALID_JSON"


class InvalidRequest(RequestError):
    """The provider refused the request."""

    status, type, code = 400, "invalid_request_error", "INVALID_REQUEST"

    def __init__(self, message: str | None = None, *, status: int = 400, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self._status = status

    @property
    def http_status(self) -> int:
        """The provider's own 4xx."""
        return self._status


class ModelNotFound(RequestError):
    """The provider does not know this model."""

    status, type, code = 404, "invalid_request_error", "MODEL_NOT_FOUND"


class NotFound(RequestError):
    """There is no such path."""

    status, type, code = 404, "invalid_request_error", "NOT_FOUND"


class MethodNotAllowed(RequestError):
    """This path does not take that method."""

    status, type, code = 405, "invalid_request_error", "METHOD_NOT_ALLOWED"


class RequestTimeout(RequestError):
    """The request did not arrive in time."""

    status, type, code, is_retryable = 408, "invalid_request_error", "REQUEST_TIMEOUT", True


class IdempotencyKeyReuse(RequestError):
    """This Idempotency-Key was used before with another body."""

    status, type, code = 409, "invalid_request_error", "IDEMPOTENCY_KEY_REUSE"


class IdempotencyInProgress(RequestError):
    """The first request with this Idempotency-Key is still running. Try again when it has ended."""

    status, type, code, is_retryable = 409, "invalid_request_error", "IDEMPOTENCY_IN_PROGRESS", True


class PayloadTooLarge(RequestError):
    """The body is too large."""

    status, type, code = 413, "invalid_request_error", "PAYLOAD_TOO_LARGE"


class UnsupportedMediaType(RequestError):
    """The body must be sent as `Content-Type: application/json`, without a content coding."""

    status, type, code = 415, "invalid_request_error", "UNSUPPORTED_MEDIA_TYPE"


class HeadersTooLarge(RequestError):
    """The request's head is too large."""

    status, type, code = 431, "invalid_request_error", "HEADERS_TOO_LARGE"


class RateLimited(RequestError):
    """Too many requests."""

    status, type, code, is_retryable = 429, "rate_limit_error", "RATE_LIMITED", True


class InternalError(RequestError):
    """Something went wrong inside ibex. The request id finds it in the server's log."""


class ProviderNotConfigured(RequestError):
    """No provider serves this model."""

    status, code = 501, "PROVIDER_NOT_CONFIGURED"


class ProviderUnavailable(RequestError):
    """The model provider could not be reached or did not answer properly."""

    status, code = 503, "PROVIDER_UNAVAILABLE"


class ProviderTimeout(RequestError):
    """The model provider did not answer in time."""

    status, code = 504, "PROVIDER_TIMEOUT"


class ServiceDegraded(RequestError):
    """ibex cannot serve this request safely just now. Try again shortly."""

    status, code, is_retryable = 503, "SERVICE_DEGRADED", True


class StoreError(IbexError):
    """A store did not do what it was asked."""


class StoreUnavailable(StoreError):
    """A store is away, refused the connection or was too slow; the same call may succeed later."""


class StoreRefused(StoreError):
    """A store answered no; the same call can never succeed."""


class OperatorError(IbexError):
    """The command could not be done."""

    def __init__(self, message: str | None = None, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        """What to do next, as a sentence; printed on a line of its own."""


class ConfigurationError(OperatorError):
    """A setting is missing or wrong."""


class SchemaMismatch(OperatorError):
    """The database's schema is not the one this version of ibex needs."""


class DataDirectoryLocked(OperatorError):
    """Another ibex server is using this data directory."""


class EngineFailed(OperatorError):
    """An embedded engine did not start."""


class EmbeddedExtraMissing(OperatorError):
    """The embedded engines are not installed."""


class UnknownEntity(OperatorError):
    """There is nothing with this id."""


class ServerNotRunning(OperatorError):
    """No ibex server is running on this data directory."""
