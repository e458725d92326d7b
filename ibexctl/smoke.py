"""`ibexctl smoke`: one completion through a running proxy, whole and streamed, and the record both must leave."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from secrets import token_hex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ibex.domain.identity import DEV_AGENT_ID, DEV_TOKEN, AgentId, parse_uuid
from ibex.errors import ConfigurationError, OperatorError, ServerNotRunning, StoreError
from ibexctl.command import command
from ibexctl.operation import operate, read_settings
from ibexctl.output import Answer, Table
from ibexctl.proxy import Proxy, Reply

if TYPE_CHECKING:
    from ibex.config import Settings
    from ibex.runtime import Operator

EXPECTED = "IBEX_OK"
DEFAULT_ADDRESS = "http://localhost:8080"
RECORD_SECONDS = 30.0
"""How long the recorder may take to deliver two turns before the check fails."""

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


@dataclass
class Check:
    """One thing tried, and how it went."""

    name: str
    result: str = SKIPPED
    detail: str = ""
    hint: str | None = None
    duration_ms: float = 0.0

    def as_data(self) -> dict[str, object]:
        """The check as `--json` shows it."""
        return {
            "name": self.name,
            "result": self.result,
            "detail": self.detail,
            "hint": self.hint,
            "duration_ms": round(self.duration_ms, 1),
        }


@dataclass
class Run:
    """One smoke test: the checks so far; after a failure the rest is skipped."""

    proxy: Proxy
    settings: "Settings"
    session_id: str = field(default_factory=lambda: f"smoke-{token_hex(8)}")
    checks: list[Check] = field(default_factory=list)
    upstream: str | None = None

    @property
    def has_passed(self) -> bool:
        """Whether nothing failed."""
        return all(check.result != FAILED for check in self.checks)

    def try_(self, name: str, action: Callable[[], str]) -> None:
        """Run one check; what it returns is its detail, an OperatorError is its failure."""
        check = Check(name)
        self.checks.append(check)
        if not self.has_passed:
            check.detail = "an earlier check failed"
            return
        started = time.monotonic()
        try:
            check.detail = action()
            check.result = PASSED
        except _NoStoreAccess as error:
            check.detail = f"no store access: {error.message}"
        except OperatorError as error:
            check.result, check.detail, check.hint = FAILED, error.message, error.hint
        check.duration_ms = (time.monotonic() - started) * 1000


class _NoStoreAccess(OperatorError):
    """The proxy's stores are out of this program's reach."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    exits = {0: "nothing failed", 1: "a check failed: it says why"}
    command(app, "smoke", example="ibexctl smoke\nibexctl smoke --self-contained --json", exits=exits)(smoke)


def smoke(
    addr: Annotated[
        str | None,
        typer.Option(
            "--addr",
            metavar="URL",
            envvar="IBEX_PROXY_ADDR",
            help=f"Where the proxy listens. Else: the server on this data directory, or {DEFAULT_ADDRESS}.",
        ),
    ] = None,
    agent: Annotated[
        str,
        typer.Option(
            "--agent", metavar="AGENT", envvar="IBEX_DEV_AGENT_ID", help="The agent to act as.", show_default=True
        ),
    ] = str(DEV_AGENT_ID),
    token: Annotated[
        str,
        typer.Option(
            "--token",
            metavar="TOKEN",
            envvar="IBEX_DEV_TOKEN",
            help="The bearer; better given by its variable, since arguments are for everybody here to read.",
            show_default="the development token",
        ),
    ] = DEV_TOKEN,
    model: Annotated[str, typer.Option("--model", metavar="MODEL", help="The model to ask.")] = "gpt-4o-mini",
    self_contained: Annotated[
        bool, typer.Option("--self-contained", help="Start a server of its own against the sandbox, and stop it after.")
    ] = False,
) -> Answer:
    """Try a running proxy end to end.

    It asks for a completion, whole and as a stream, and checks the record that both must leave. Without access to the
    stores the record is not checked, and that is said.
    """
    agent_id = parse_uuid(agent)
    if agent_id is None:
        raise typer.BadParameter(f"{agent!r} is not an agent's id.", param_hint="--agent")
    if not self_contained:
        settings = read_settings()
        address = addr or _running_address(settings) or DEFAULT_ADDRESS
        return _answer(_smoke(Run(Proxy(address.rstrip("/"), token, agent), settings), AgentId(agent_id), model))
    from ibexctl.trial import own_server

    with own_server() as (address, settings):
        proxy = Proxy(address, DEV_TOKEN, str(DEV_AGENT_ID))
        return _answer(_smoke(Run(proxy, settings), DEV_AGENT_ID, model))


def _smoke(run: Run, agent_id: AgentId, model: str) -> Run:
    run.try_("health", lambda: _check_health(run.proxy))
    run.try_("completion", lambda: _check_completion(run, model))
    run.try_("stream", lambda: _check_stream(run, model))
    run.try_("record", lambda: _check_record(run, agent_id))
    return run


def _running_address(settings: "Settings") -> str | None:
    """Where the server on this data directory listens, if one runs."""
    from ibex.server.supervision.status import request_status

    try:
        return request_status(settings).url
    except ServerNotRunning:
        return None


def _answer(run: Run) -> Answer:
    data = {
        "passed": run.has_passed,
        "proxy": run.proxy.address,
        "upstream": run.upstream,
        "session_id": run.session_id,
        "checks": [check.as_data() for check in run.checks],
    }
    rows = [(check.name, check.result, f"{check.duration_ms:.0f} ms", check.detail) for check in run.checks]
    views = (
        Table(("check", "result", "took", "detail"), rows),
        f"Smoke test of {run.proxy.address}: {'PASSED' if run.has_passed else 'FAILED'}",
    )
    hints = tuple(f" hint: {check.hint}" for check in run.checks if check.hint)
    return Answer(data, views, hints, exit_code=0 if run.has_passed else 1)


def _check_health(proxy: Proxy) -> str:
    status = proxy.get("/health").status
    if status != 200:
        raise OperatorError(f"/health answered {status}.", hint="Does something else listen on that address?")
    return "200"


def _question(model: str, *, is_streaming: bool) -> dict[str, object]:
    message = {"role": "user", "content": f"Reply with exactly: {EXPECTED}"}
    return {"model": model, "stream": is_streaming, "temperature": 0, "messages": [message]}


def _check_completion(run: Run, model: str) -> str:
    reply = run.proxy.chat(_question(model, is_streaming=False), session_id=run.session_id)
    body = reply.json()
    try:
        content = body["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise OperatorError("The reply has no choice with a message.", hint="Is OPENAI_BASE_URL right?") from None
    _expect(content)
    run.upstream = _name_upstream(reply, body)
    return _UPSTREAMS[run.upstream]


def _check_stream(run: Run, model: str) -> str:
    reply = run.proxy.chat(_question(model, is_streaming=True), session_id=run.session_id)
    items = [line[5:].strip() for line in reply.body.decode(errors="replace").splitlines() if line.startswith("data:")]
    if not items or items[-1] != "[DONE]":
        raise OperatorError("The stream does not end with [DONE].", hint="The proxy's log says why.")
    content = ""
    for item in items[:-1]:
        try:
            choices = json.loads(item).get("choices") or []
            content += "".join(choice["delta"].get("content") or "" for choice in choices)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise OperatorError(
                "An event of the stream is no completion chunk.", hint="Is OPENAI_BASE_URL right?"
            ) from None
    _expect(content)
    return f"{len(items) - 1} events and [DONE]"


def _expect(content: Any) -> None:
    if not isinstance(content, str) or content.strip().strip("\"'`.") != EXPECTED:
        raise OperatorError(
            f"The content is not {EXPECTED} but {str(content)[:80]!r}.",
            hint="Try again; if it stays so, look at OPENAI_BASE_URL and the agent's directive.",
        )


_UPSTREAMS = {
    "openai": "real OpenAI completion received and validated",
    "sandbox": "from the ibex sandbox: a stand-in, not OpenAI",
    "other": "from an OpenAI-compatible upstream: a stand-in, not OpenAI",
}


def _name_upstream(reply: Reply, body: Any) -> str:
    """Who answered, by what only that upstream says."""
    if str(body.get("system_fingerprint") or "").startswith("ibex-sandbox"):
        return "sandbox"
    return "openai" if "openai-processing-ms" in reply.headers else "other"


def _check_record(run: Run, agent_id: AgentId) -> str:
    async def look(operator: "Operator") -> str:
        import asyncio

        deadline = time.monotonic() + RECORD_SECONDS
        while True:
            problem = await _find_fault(operator, run.session_id, agent_id)
            if problem is None:
                return "2 checkpoints and 2 traces, all whole"
            if time.monotonic() > deadline:
                raise OperatorError(problem, hint="See `ibexctl status` and the recorder's log: a store may be away.")
            await asyncio.sleep(0.1)

    from ibex.engines.addresses import resolve_addresses

    try:
        # embedded stores are within reach while their server runs here: those started for this would be empty
        resolve_addresses(run.settings)
        return operate(look, settings=run.settings, clickhouse=True)
    except (ServerNotRunning, ConfigurationError, StoreError) as error:
        raise _NoStoreAccess(error.message) from None


async def _find_fault(operator: "Operator", session_id: str, agent_id: AgentId) -> str | None:
    """What is missing in the record of the two turns; None when all is there."""
    from ibex.errors import UnknownEntity

    try:
        found: dict[str, Any] = await operator.sessions.show(session_id, agent_id)
    except UnknownEntity:
        return "The session has no checkpoint."
    checkpoints = found["checkpoints"]
    traces = await operator.traces.list(org_ids=await operator.all_org_ids(), agent=agent_id, session=session_id)
    if [row["turn_index"] for row in checkpoints] != [0, 1]:
        return f"The session has {len(checkpoints)} checkpoints, not turns 0 and 1."
    if not all(row["is_complete"] for row in checkpoints):
        return "A checkpoint is marked incomplete though its reply was whole."
    if {row["turn_id"] for row in traces} != {row["turn_id"] for row in checkpoints}:
        return f"The session has {len(traces)} traces that do not match its 2 checkpoints."
    return None if all(row["outcome"] == "ok" for row in traces) else "A trace's outcome is not ok."
