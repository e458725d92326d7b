"""Log lines: JSON for machines, text for people, on standard error; and the access log's own buffer."""

import asyncio
import contextlib
import json
import logging
import os
import sys
from datetime import UTC, datetime
from typing import Any

import msgspec

from ibex.config import Settings
from ibex.telemetry.request_scope import facts_of_current_request

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def configure_logging(settings: Settings, process: str) -> None:
    """Send this process's log lines to standard error. `process` names it in each line ("worker 0")."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter(process) if settings.resolved_log_format == "json" else _TextFormatter(process))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("ibex").setLevel(settings.log_level.upper())
    for library in ("aiohttp.access", "aiohttp.server", "asyncio", "opentelemetry"):
        # their messages can quote the parser's text, a header map or a setting, which no log line may hold
        logging.getLogger(library).setLevel(logging.CRITICAL)


def _facts(record: logging.LogRecord) -> dict[str, Any]:
    return facts_of_current_request() | {name: value for name, value in vars(record).items() if name not in _STANDARD}


def _timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _error_line(record: logging.LogRecord) -> str | None:
    """An exception's type and place, never its text: a driver's message can quote what it was given."""
    if not record.exc_info or record.exc_info[1] is None:
        return None
    error, trace = record.exc_info[1], record.exc_info[2]
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f" at {os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}" if trace is not None else ""  # noqa: PTH119
    return f"{type(error).__name__}{place}"


class _JsonFormatter(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _timestamp(record.created),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
            **_facts(record),
        }
        if (error := _error_line(record)) is not None:
            line["error"] = error
        return json.dumps(line, default=str)


class _TextFormatter(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        facts = _facts(record)
        if (error := _error_line(record)) is not None:
            facts["error"] = error
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S.%f")[:-3]
        tail = "".join(f" {name}={value}" for name, value in facts.items())
        return f"{time} {record.levelname.lower():7} {self._process:10} {record.getMessage()}{tail}"


class AccessLog:
    """One line a request, without content, written in batches: `logging` costs thirty times as much a line."""

    def __init__(self, settings: Settings, process: str) -> None:
        self.is_enabled = settings.access_log and settings.log_level in {"debug", "info"}
        self._as_json = settings.resolved_log_format == "json"
        self._encode = msgspec.json.Encoder().encode
        names = {"level": "info", "process": process, "logger": "ibex.access", "message": "request"}
        self._names = self._encode(names)[1:-1] + b"," if self._as_json else f"info    {process:10} request".encode()
        self._second, self._stamp = -1, b""
        self._lines: list[bytes] = []
        self._is_scheduled = False

    def write(self, time: float, facts: dict[str, Any]) -> None:
        """Note one request that ended at `time` (Unix seconds)."""
        if not self.is_enabled:
            return
        second = int(time)
        if second != self._second:
            self._second = second
            self._stamp = self._make_stamp(second)
        milliseconds = int((time - second) * 1e3)
        if self._as_json:
            # the head is spliced in: encoding it anew for each line costs more than the line
            self._lines.append(b'%b%03dZ",%b%b' % (self._stamp, milliseconds, self._names, self._encode(facts)[1:]))
        else:
            tail = "".join([f" {name}={value}" for name, value in facts.items() if value is not None])
            self._lines.append(b"%b%03d %b%b" % (self._stamp, milliseconds, self._names, tail.encode()))
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_later(0.05, self.flush)

    def _make_stamp(self, second: int) -> bytes:
        """What all lines of a second begin with, up to the milliseconds."""
        if self._as_json:
            return f'{{"time":"{datetime.fromtimestamp(second, UTC):%Y-%m-%dT%H:%M:%S}.'.encode()
        return f"{datetime.fromtimestamp(second):%H:%M:%S}.".encode()

    def flush(self) -> None:
        """Write what is buffered. A log that cannot be written must not stop the proxy."""
        self._is_scheduled = False
        lines, self._lines = self._lines, []
        if lines:
            with contextlib.suppress(OSError):
                os.write(sys.stderr.fileno(), b"\n".join(lines) + b"\n")
