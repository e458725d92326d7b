"""How a node is, and the control socket through which the command line asks: one JSON object a line."""

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from ibex.config import Settings
from ibex.errors import OperatorError, ServerNotRunning
from ibex.server.supervision.sockets import SocketPath

SOCKET_NAME = "control.sock"
ANSWER_SECONDS = 5.0
RELOAD_SECONDS = 600.0
"""For as long a reload is waited for: a process has a minute to start."""
MAX_LINE_BYTES = 1 << 20


class ProcessStatus(msgspec.Struct, kw_only=True):
    """One process of the node."""

    name: str
    title: str
    """As `ps` shows it."""
    pid: int | None
    is_up: bool
    uptime_seconds: float | None = None
    restarts: int = 0
    memory_bytes: int | None = None
    """Resident memory of this process alone; None where the system does not say."""
    facts: dict[str, Any] = {}
    """What the process says about itself."""


class StopStatus(msgspec.Struct, kw_only=True):
    """Where a stop is."""

    doing: str
    """`leaving` (it serves, and /ready says that it will not for long), `draining`, or `delivering` the journal."""
    seconds_left: float
    """How much longer this part of it may take."""


class NodeStatus(msgspec.Struct, kw_only=True):
    """What `ibexctl status` shows, and what `serve` prints when it is ready."""

    version: str
    env: str
    url: str
    metrics_url: str
    data_dir: str
    llm_mode: str
    upstream: str
    started_at: str
    """RFC 3339, UTC."""
    uptime_seconds: float
    start_seconds: float | None = None
    """From the start to the moment at which everything served."""
    is_first_start: bool
    """Whether the data directory was new."""
    engines: list[str]
    """The embedded engines."""
    processes: list[ProcessStatus]
    """The supervisor first."""
    warnings: list[str] = []
    """What the operator should know since the start."""
    stop: StopStatus | None = None
    """Where its stop is, once it was told to."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain


class ReloadResult(msgspec.Struct, kw_only=True):
    """What a rolling restart did."""

    replaced: list[str]
    """Processes that have a successor; what they still do ends beside it."""
    ignored_settings: list[str]
    """Settings that changed, and need a full restart to matter."""
    seconds: float


def describe_process(
    name: str, pid: int | None, is_up: bool, age: float, restarts: int = 0, facts: dict[str, Any] | None = None
) -> ProcessStatus:
    """One process as it is now; what it uses is read from /proc."""
    is_seen = is_up and pid is not None
    return ProcessStatus(
        name=name,
        title=(_title(pid) if is_seen and name == "engine postgres" else None) or f"ibex: {name}",
        pid=pid if is_up else None,
        is_up=is_up,
        uptime_seconds=age if is_up else None,
        restarts=restarts,
        memory_bytes=_resident_bytes(pid) if is_seen else None,
        facts=facts or {},
    )


def _resident_bytes(pid: int | None) -> int | None:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _title(pid: int | None) -> str | None:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return None
    return command.rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace") or None


class ControlSocket:
    """`<run>/control.sock`, mode 0600: answers the requests `status` and, when it is done, `reload`."""

    def __init__(
        self, run_dir: Path, status: Callable[[], NodeStatus], reload: Callable[[], Awaitable[ReloadResult]]
    ) -> None:
        self._path = run_dir / SOCKET_NAME
        self._status = status
        self._reload = reload
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen, in the place of whatever a dead server left there."""
        self._path.unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with SocketPath(self._path) as address:
            sock.bind(address)
        self._path.chmod(0o600)
        self._server = await asyncio.start_unix_server(self._serve, sock=sock, limit=MAX_LINE_BYTES)

    async def close(self) -> None:
        """Stop listening and remove the socket."""
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError, TimeoutError), contextlib.closing(writer):
            while line := await asyncio.wait_for(reader.readline(), ANSWER_SECONDS):
                writer.write(await self._answer(line) + b"\n")
                await asyncio.wait_for(writer.drain(), ANSWER_SECONDS)

    async def _answer(self, line: bytes) -> bytes:
        try:
            request = msgspec.json.decode(line, type=dict[str, Any]).get("request")
        except msgspec.DecodeError:
            request = None
        match request:
            case "status":
                return msgspec.json.encode({"status": self._status()})
            case "reload":
                try:
                    return msgspec.json.encode({"reload": await self._reload()})
                except OperatorError as error:
                    return msgspec.json.encode({"error": error.message, "hint": error.hint})
            case _:
                return msgspec.json.encode({"error": "The only requests are: status, reload"})


class _Answer(msgspec.Struct):
    status: NodeStatus | None = None
    reload: ReloadResult | None = None
    error: str | None = None
    hint: str | None = None


def request_status(settings: Settings) -> NodeStatus:
    """Ask the server that runs on this data directory how it is; raises ServerNotRunning when there is none."""
    status = _request(settings, "status", ANSWER_SECONDS).status
    if status is None:
        raise ServerNotRunning("The server does not say how it is.", hint="Is it of another version?")
    return status


def request_reload(settings: Settings) -> ReloadResult:
    """Have the server replace its processes with such as have the settings of now; returns when that is done.

    Raises ServerNotRunning, and OperatorError when the server refuses.
    """
    answer = _request(settings, "reload", RELOAD_SECONDS)
    if answer.reload is None:
        raise OperatorError(answer.error or "The server did not reload.", hint=answer.hint)
    return answer.reload


def _request(settings: Settings, request: str, seconds: float) -> _Answer:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(seconds)
        try:
            with SocketPath(settings.run_dir / SOCKET_NAME) as address:
                sock.connect(address)
            sock.sendall(msgspec.json.encode({"request": request}) + b"\n")
            with sock.makefile("rb") as answers:
                line = answers.readline(MAX_LINE_BYTES)
            return msgspec.json.decode(line, type=_Answer)
        except (OSError, msgspec.DecodeError) as error:
            raise ServerNotRunning(
                f"No ibex server answers on the data directory {settings.data_dir}.",
                hint="Start one with: ibexctl serve",
            ) from error
