"""A caller of a running proxy, on the standard library alone: what `ibexctl smoke` asks with."""

import http.client
import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ibex.errors import OperatorError

_HINTS = {
    "INVALID_TOKEN": "Set IBEX_DEV_TOKEN to a valid token: `ibexctl token mint --org ORG`.",
    "AGENT_NOT_AUTHORIZED": "Set IBEX_DEV_AGENT_ID to an agent of the token's organization: `ibexctl agent register`.",
    "INSUFFICIENT_PERMISSIONS": "Mint a token with the permission set ProxyChatCompletion.",
    "RATE_LIMITED": "Wait a minute, or raise the limit: `ibexctl org limit ORG --rpm N`.",
    "PROVIDER_NOT_CONFIGURED": "Start the proxy with OPENAI_API_KEY set and the model within IBEX_OPENAI_MODELS.",
    "PROVIDER_UNAVAILABLE": "Check the proxy's OPENAI_API_KEY and OPENAI_BASE_URL, and that it may reach the provider.",
    "SERVICE_DEGRADED": "A store is away: ask the proxy's /ready which.",
}


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer: lower-case header names, the body as it came."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The body as JSON; raises OperatorError when it is none."""
        try:
            return json.loads(self.body)
        except ValueError:
            raise OperatorError("The reply is not JSON.", hint="Does something else listen on that address?") from None


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy's address and who calls it."""

    address: str
    bearer: str
    agent_id: str
    answer_seconds: float = 180.0
    """How long an answer may take."""

    def __repr__(self) -> str:
        return f"Proxy({self.address})"

    def get(self, path: str) -> Reply:
        """Ask a path that needs no token."""
        return self._send("GET", path, None, {})

    def chat(self, body: Mapping[str, object], *, session_id: str) -> Reply:
        """Ask for a completion; a refusal becomes an OperatorError that says what to do."""
        reply = self.ask(body, session_id=session_id)
        if reply.status != 200:
            raise _refusal(reply)
        return reply

    def ask(self, body: Mapping[str, object], *, session_id: str) -> Reply:
        """Ask for a completion; the reply whatever its status. Raises OperatorError when there is none."""
        headers = {**self.headers(), "X-IBEX-Session-ID": session_id}
        return self._send("POST", "/v1/chat/completions", json.dumps(body).encode(), headers)

    def headers(self) -> dict[str, str]:
        """What a caller presents."""
        return {
            "Authorization": f"Bearer {self.bearer}",
            "X-IBEX-Agent-ID": self.agent_id,
            "Content-Type": "application/json",
        }

    def _send(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> Reply:
        connection = self._connect()
        try:
            connection.request(method, self._base_path() + path, body, headers)
            response = connection.getresponse()
            named = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, named, response.read())
        except http.client.IncompleteRead:
            raise OperatorError("The reply broke off.", hint="The proxy's log says why.") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise OperatorError(
                f"Nothing answers properly at {self.address} ({reason}).",
                hint="Start the proxy with `ibexctl serve`, or say by --addr where it listens.",
            ) from None
        finally:
            connection.close()

    def _connect(self) -> http.client.HTTPConnection:
        parts = urlsplit(self.address)
        try:
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if parts.scheme not in {"http", "https"} or not host:
            raise OperatorError(f"{self.address!r} is not an address.", hint="Write it as http://127.0.0.1:8080.")
        if parts.scheme == "https":
            return http.client.HTTPSConnection(
                host, port, timeout=self.answer_seconds, context=ssl.create_default_context()
            )
        return http.client.HTTPConnection(host, port, timeout=self.answer_seconds)

    def _base_path(self) -> str:
        return urlsplit(self.address).path.rstrip("/")


def _refusal(reply: Reply) -> OperatorError:
    try:
        error = json.loads(reply.body)["error"]
        code, message, request_id = str(error["code"]), str(error["message"]), str(error["request_id"])
    except (ValueError, KeyError, TypeError):
        return OperatorError(
            f"The proxy answered {reply.status}, and not in ibex's words.",
            hint="Does something else listen on that address?",
        )
    hint = _HINTS.get(code, "The request id finds the line in the proxy's log.")
    return OperatorError(f"The proxy answered {reply.status} {code}: {message} (request {request_id})", hint=hint)
