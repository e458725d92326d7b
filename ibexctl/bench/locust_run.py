"""A run of the locust scenario in loadtests/, as a process of its own, and its figures as ours."""

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ibex.errors import OperatorError
from ibexctl.bench.callers import MODEL, Callers, Target
from ibexctl.bench.outcome import Outcome
from ibexctl.bench.plan import Plan
from ibexctl.bench.progress import Progress

_STOP_SECONDS = 30
"""How long locust lets the requests under way end."""
_WHOLE = frozenset({"chat", "stream: whole"})
"""locust's names for whole answers; `stream: head` is a part of one."""


def require_locust() -> None:
    """Raises OperatorError when locust is not installed."""
    if importlib.util.find_spec("locust") is None:
        raise OperatorError(
            "This scenario needs locust, which is not installed.",
            hint="pip install 'ibex-proxy[bench]'; the scenarios saturation, stream and soak work without it.",
        )


def find_locustfile() -> Path:
    """The scenario: in a checkout loadtests/, in an installed wheel beside this package."""
    package = Path(__file__).resolve().parents[1]
    for place in (package / "_loadtests", package.parent / "loadtests"):
        if (place / "locustfile.py").is_file():
            return place / "locustfile.py"
    raise OperatorError("loadtests/locustfile.py is missing.", hint="Install ibex anew, or run from its checkout.")


def run_locust(
    outcome: Outcome, plan: Plan, target: Target, callers: Callers | None, seconds: float, progress: Progress
) -> None:
    """Load the target and fill in what the clients saw. Raises OperatorError when locust itself fails."""
    with tempfile.TemporaryDirectory(prefix="ibex-locust-") as directory:
        tokens = Path(directory) / "tokens"
        tokens.touch(mode=0o600)
        tokens.write_text("\n".join(callers.bearers if callers else ["none"]))
        log = Path(directory) / "log"
        with log.open("wb") as errors, (Path(directory) / "figures").open("w+b") as figures:
            process = subprocess.Popen(  # noqa: S603 - our own arguments
                [
                    *(sys.executable, "-m", "locust", *_arguments(plan, target, callers, tokens)),
                    *("--headless", "--only-summary", "--json"),
                    *(f"--run-time={max(1, round(seconds))}s", f"--stop-timeout={_STOP_SECONDS}"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=figures,
                stderr=errors,
            )
            _wait(process, progress)
            figures.seek(0)
            try:
                entries = json.loads(figures.read())
            except ValueError:
                said = log.read_text(errors="replace").strip().splitlines()[-1:]
                raise OperatorError(f"locust failed: {''.join(said)[:300]}", hint="Is [bench] whole?") from None
    _read(outcome, entries, seconds)


def _arguments(plan: Plan, target: Target, callers: Callers | None, tokens: Path) -> list[str]:
    options: Mapping[str, object] = {
        "--locustfile": find_locustfile(),
        "--host": target.origin + target.path.removesuffix("/v1/chat/completions"),
        "--users": plan.users,
        "--spawn-rate": plan.users,
        "--loglevel": "WARNING",
        "--token-file": tokens,
        "--model": MODEL,
        "--stream-share": round(plan.stream_share * 100),
        "--sandbox-delay-ms": plan.provider_ms,
    }
    words = [f"{name}={value}" for name, value in options.items()]
    if callers is not None:
        words.append(f"--ibex-agent={callers.agent_id}")
    return words


@contextmanager
def running_page(plan: Plan, target: Target, callers: Callers, port: int) -> Iterator["subprocess.Popen[bytes]"]:
    """locust's own page on a port of loopback, with the plan's load filled in; who opens it starts the load."""
    with tempfile.TemporaryDirectory(prefix="ibex-locust-") as directory:
        tokens = Path(directory) / "tokens"
        tokens.touch(mode=0o600)
        tokens.write_text("\n".join(callers.bearers))
        process = subprocess.Popen(  # noqa: S603 - our own arguments
            [
                *(sys.executable, "-m", "locust", *_arguments(plan, target, callers, tokens)),
                *("--web-host=127.0.0.1", f"--web-port={port}"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        try:
            yield process
        finally:
            process.terminate()
            process.wait()


def _wait(process: "subprocess.Popen[bytes]", progress: Progress) -> None:
    begun = time.monotonic()
    try:
        while True:
            try:
                process.wait(1.0)
            except subprocess.TimeoutExpired:
                progress.show(time.monotonic() - begun)
            else:
                return
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def _read(outcome: Outcome, entries: list[dict[str, Any]], seconds: float) -> None:
    outcome.seconds = seconds
    by_second: dict[int, int] = {}
    for entry in entries:
        failed = int(entry["num_failures"])
        if failed:
            outcome.failures[entry["name"]] = failed
        if entry["name"] not in _WHOLE:
            continue
        outcome.completed += int(entry["num_requests"]) - failed
        for milliseconds, count in entry["response_times"].items():
            outcome.latency.add_many(float(milliseconds) / 1e3, int(count))
        for second, count in entry["num_reqs_per_sec"].items():
            by_second[int(second)] = by_second.get(int(second), 0) + int(count)
    outcome.in_time = outcome.completed
    outcome.timeline = [by_second[second] for second in sorted(by_second)]
