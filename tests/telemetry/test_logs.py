"""Log lines: what is in them, and what never is."""

import contextvars
import json
import logging
import os
import subprocess
import sys
import weakref

import pytest

from ibex.telemetry import RequestScope
from ibex.telemetry.logs import _JsonFormatter
from ibex.telemetry.request_scope import facts_of_current_request

LOG_SOMETHING = """
import logging
from ibex.config import load_settings
from ibex.telemetry import AccessLog, configure_logging
import asyncio

async def main():
    settings = load_settings()
    configure_logging(settings, "worker 0")
    logging.getLogger("ibex.x").info("hello", extra={"org_id": "o-1"})
    logging.getLogger("opentelemetry.util.re").error("authorization=secret-key")
    logging.getLogger("aiohttp.server").error("GET /secret-path")
    try:
        raise ValueError("secret-text")
    except ValueError:
        logging.getLogger("ibex.x").exception("it failed")
    access = AccessLog(settings, "worker 0")
    access.write(1.5, {"route": "chat", "status": 200, "turn_id": None})
    access.flush()

asyncio.run(main())
"""


def run(**environ: str) -> list[str]:
    """What a process of this configuration writes to standard error."""
    done = subprocess.run(
        [sys.executable, "-c", LOG_SOMETHING],
        env={**os.environ, "IBEX_ENV_FILE": os.devnull, **environ},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_a_line_for_machines_is_one_json_object() -> None:
    hello, failed, access = (json.loads(line) for line in run(IBEX_LOG_FORMAT="json"))

    assert hello["message"] == "hello"
    assert (hello["level"], hello["process"], hello["logger"], hello["org_id"]) == ("info", "worker 0", "ibex.x", "o-1")
    assert hello["time"].endswith("Z")
    assert failed["error"].startswith("ValueError at ")
    assert (access["message"], access["status"], access["time"]) == ("request", 200, "1970-01-01T00:00:01.500Z")


def test_a_line_for_people_says_the_same() -> None:
    hello, failed, access = run(IBEX_LOG_FORMAT="text")

    assert hello.endswith("worker 0   hello org_id=o-1")
    assert "ValueError at " in failed
    assert access.endswith("request route=chat status=200")


@pytest.mark.parametrize("form", ["json", "text"])
def test_an_exceptions_text_and_the_librarys_lines_are_never_written(form: str) -> None:
    assert "secret" not in "".join(run(IBEX_LOG_FORMAT=form, IBEX_LOG_LEVEL="debug"))


@pytest.mark.parametrize("environ", [{"IBEX_ACCESS_LOG": "false"}, {"IBEX_LOG_LEVEL": "warning"}])
def test_the_access_log_can_be_switched_off(environ: dict[str, str]) -> None:
    assert not any("request" in line for line in run(**environ))


def test_a_line_tells_the_request_it_belongs_to() -> None:
    class Request:
        def log_facts(self) -> dict[str, str]:
            return {"request_id": "r-1", "trace_id": "t-1"}

    formatter = _JsonFormatter("worker 0")
    record = logging.makeLogRecord({"msg": "key lost", "turn_id": "u-1"})
    scope = RequestScope(Request())
    inside = json.loads(formatter.format(record))
    scope.end()
    outside = json.loads(formatter.format(record))

    assert (inside["request_id"], inside["turn_id"], inside["trace_id"]) == ("r-1", "u-1", "t-1")
    assert "request_id" not in outside


def test_what_outlives_a_request_neither_names_it_nor_keeps_it() -> None:
    class Request:
        def log_facts(self) -> dict[str, str]:
            return {"request_id": "r-1"}

    request = Request()
    scope = RequestScope(request)
    inherited = contextvars.copy_context()
    assert inherited.run(facts_of_current_request) == {"request_id": "r-1"}

    kept = weakref.ref(request)
    scope.end()
    del request

    assert inherited.run(facts_of_current_request) == {}
    assert kept() is None
