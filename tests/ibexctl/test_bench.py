"""`ibexctl bench`: quick runs of the real thing, and the arithmetic that its figures stand on."""

import asyncio
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ibex.errors import OperatorError
from ibex.sandbox import Sandbox
from ibexctl.bench import locust_run
from ibexctl.bench.callers import Callers, Target, build_requests
from ibexctl.bench.latency import Durations
from ibexctl.bench.nginx import find_nginx
from ibexctl.bench.processes import cpu_seconds
from ibexctl.bench.report import render_report
from ibexctl.bench.scrape import Counted
from ibexctl.bench.verdict import Check, compare, read_baseline


def start_bench(*words: str) -> "subprocess.Popen[str]":
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("IBEX_", "OPENAI_"))}
    return subprocess.Popen(
        [sys.executable, "-m", "ibexctl", "bench", *words, "--json"],
        env=outside | {"IBEX_ENV_FILE": os.devnull},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What scenarios say after a moment each, run side by side; the verdict is the machine's, not the test's."""
    directory = tmp_path_factory.mktemp("bench")
    options = ("--duration", "1.5", "--users", "8", "--tokens", "3", "--report")
    further = {"stream": ("--tls",), "soak": ()}
    running = {
        name: start_bench(name, *options, str(directory / f"{name}.html"), *words) for name, words in further.items()
    }
    found: dict[str, Any] = {}
    for name, process in running.items():
        out, errors = process.communicate(timeout=100)
        assert process.returncode in {0, 1}, errors
        found[name] = json.loads(out)
        assert "error" not in found[name], found[name]
        assert "measuring" in errors
        found[name]["page"] = (directory / f"{name}.html").read_text()
    yield found
    shutil.rmtree(directory)


@pytest.mark.parametrize("scenario", ["soak", "stream"])
def test_every_answer_has_its_checkpoint_and_its_trace(results, scenario: str) -> None:
    records = results[scenario]["records"]
    assert records["expected"] > 0
    assert records["checkpoints"] == records["traces"] == records["expected"]
    verdicts = {target["name"]: target["passed"] for target in results[scenario]["targets"]}
    assert verdicts["checkpoints by answers"]
    assert verdicts["traces by answers"]
    assert verdicts["failed requests"]


def test_ibex_stands_beside_its_provider_and_nginx(results) -> None:
    contenders = {found["name"]: found for found in results["stream"]["contenders"]}
    assert set(contenders) == {"direct", "nginx", "ibex"}
    assert (contenders["nginx"]["skipped"] is None) == (find_nginx() is not None)
    for name in ("direct", "ibex"):
        assert contenders[name]["completed"] > 0
        latency = contenders[name]["latency_ms"]
        assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"] <= latency["p99_9"] <= latency["max"]
    assert contenders["ibex"]["cpu_us_per_request"] > 0
    assert sum(contenders["ibex"]["timeline"]) <= contenders["ibex"]["completed"]


def test_a_provider_behind_tls_is_named_and_its_streams_are_held_open(results) -> None:
    found = results["stream"]
    assert "over TLS" in found["plan"]["provider"]
    assert "without TLS" in results["soak"]["plan"]["provider"]
    (measured,) = (contender for contender in found["contenders"] if contender["name"] == "ibex")
    assert measured["held_streams"] == found["plan"]["open_streams"] == 80
    assert measured["memory_per_stream_bytes"] is not None
    assert "memory an open stream" in {target["name"] for target in found["targets"]}


def test_a_soak_has_open_streams_and_slow_readers_beside_it_and_looks_at_every_process(results) -> None:
    (measured,) = results["soak"]["contenders"]
    assert measured["beside"]["open streams"]["completed"] >= 80
    assert measured["beside"]["slow readers"]["completed"] >= 2
    assert measured["failures"] == {}
    assert set(measured["growth"]) == {"worker 0", "recorder"}
    for held in measured["growth"].values():
        assert held["memory_bytes"]["last"] > 1 << 20
        assert held["descriptors"]["last"] > 0
        assert held["tasks"]["last"] > 0
        assert held["memory_bytes"]["per_minute"] is None  # too short a run to tell
    assert "Resident memory" in results["soak"]["page"]


@pytest.mark.parametrize("scenario", ["soak", "stream"])
def test_nothing_was_switched_off_and_the_server_says_so(results, scenario: str) -> None:
    found = results[scenario]
    features = {name: text for name, text in found["features"].items() if name != "content capture"}
    assert [name for name, text in features.items() if "off" in text.lower().split()] == []
    assert f"{found['server']['chats']:,.0f} requests authenticated" in features["authentication"]
    assert found["server"]["chats_refused"] == 0
    # in so short a run the news of the tokens' own making still voids some entries
    assert found["server"]["auth_hit_rate"] > 0.5
    assert found["server"]["overhead_ms"]["p99"] > 0


def test_streams_are_counted_by_their_events(results) -> None:
    for found in results["stream"]["contenders"]:
        if not found["skipped"]:
            # ibex asks for the usage, and keeps it from a client that did not
            each = 64 if found["name"] == "ibex" else 65
            assert found["events"] == each * found["completed"]
            assert found["first_byte_ms"]["p50"] < found["latency_ms"]["p50"]
    (measured,) = (found for found in results["stream"]["contenders"] if found["name"] == "ibex")
    assert measured["cpu_us_per_event"] > 0


def test_the_report_is_one_file_with_its_plots(results) -> None:
    page = results["stream"]["page"]
    assert page.count("<svg") >= 4
    assert "src=" not in page
    assert "href=" not in page
    assert "ibex, everything on" in page


def test_a_later_run_is_compared_with_an_earlier_one(results, tmp_path: Path) -> None:
    path = tmp_path / "before.json"
    path.write_text(json.dumps(results["soak"]))
    earlier = read_baseline(path)
    assert all(check.is_passed for check in compare(earlier, earlier))
    (ibex,) = (found for found in earlier["contenders"] if found["name"] == "ibex")
    ibex["throughput"] *= 1.3
    ibex["latency_ms"]["p99"] /= 1.3
    worse = {check.name for check in compare(earlier, results["soak"]) if not check.is_passed}
    assert worse == {"throughput by baseline", "p99 by baseline"}
    with pytest.raises(OperatorError, match="scenario"):
        compare(earlier, results["stream"])


def test_what_is_no_result_is_refused_as_a_baseline(tmp_path: Path, ibexctl) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"contenders": [1]}')
    refused = ibexctl("bench", "saturation", "--baseline", path, "--json").error
    assert "no result of a benchmark" in refused["message"]


async def test_any_compatible_endpoint_can_be_measured() -> None:
    async with Sandbox.serve() as sandbox:
        process = start_bench("saturation", "--duration", "1", "--users", "4", "--against", sandbox.base_url)
        out, errors = await _communicate(process)
    found = json.loads(out)
    assert process.returncode in {0, 1}, errors  # the verdict is the machine's
    (contender,) = found["contenders"]
    assert contender["completed"] > 0
    assert found["records"] is None
    assert found["records_skipped"]
    assert found["server"] is None


def test_an_address_where_nobody_answers_is_told(ibexctl) -> None:
    outcome = ibexctl("bench", "stream", "--duration", "1", "--against", "http://127.0.0.1:1", "--json")
    assert "generator" in outcome.error["message"]
    assert "nowhere" in ibexctl("bench", "stream", "--against", "nowhere", "--json").error["message"]


def test_without_locust_the_gate_says_what_to_install(ibexctl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "locust", None)
    refused = ibexctl("bench", "overhead", "--json").error
    assert "locust" in refused["message"]
    assert "[bench]" in refused["hint"]


def test_the_locust_scenario_is_found() -> None:
    assert locust_run.find_locustfile().is_file()


@given(st.lists(st.floats(min_value=1e-6, max_value=100), min_size=1, max_size=200))
def test_quantiles_are_within_a_percent(seconds: list[float]) -> None:
    durations = Durations()
    for duration in seconds:
        durations.add(duration)
    for share in (0.5, 0.99):
        exact = sorted(seconds)[math.ceil(share * len(seconds)) - 1]
        assert durations.quantile(share) == pytest.approx(exact, rel=0.0101)
    copy = Durations.from_buckets(durations.buckets(), durations.total, durations.largest)
    assert copy.summary() == durations.summary()


def test_quantiles_of_the_server_are_interpolated_as_prometheus_does() -> None:
    def page(counts: tuple[float, float, float]) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        bounds = ("0.01", "0.025", "+Inf")
        return {
            ("ibex_proxy_overhead_seconds_bucket", (("le", bound), ("stream", "false"))): count
            for bound, count in zip(bounds, counts, strict=True)
        }

    counted = Counted(page((5, 5, 5)), page((55, 105, 105)))
    found = counted.quantiles("overhead_seconds")
    assert found is not None
    assert found["p50"] == pytest.approx(10)
    assert found["p99"] == pytest.approx(24.7)
    assert counted.quantiles("overhead_seconds", stream="true") is None


def test_every_user_has_callers_sessions_and_its_share_of_streams() -> None:
    callers = Callers("agent", ("one", "two", "three"))
    requests = build_requests(Target("127.0.0.1", 80), callers, users=5, stream_share=0.25)
    for user in range(5):
        own = requests[user::5]
        assert sum(b'"stream": true' in request for request in own) == pytest.approx(len(own) / 4, abs=1)
    sessions = {request.partition(b"X-IBEX-Session-ID: ")[2].partition(b"\r\n")[0] for request in requests}
    assert len(sessions) == len(requests)
    assert "two" not in repr(callers)


def test_a_target_that_could_not_be_measured_is_neither_passed_nor_failed() -> None:
    assert Check("p99", None, "<", 20).is_passed is None
    assert Check("p99", 19.9, "<", 20).is_passed
    assert not Check("p99", 20, "<", 20).is_passed


def test_processor_time_is_read_of_a_process_whose_title_has_spaces_and_brackets() -> None:
    program = "import setproctitle, sys; setproctitle.setproctitle('ibex: a) (b 7'); print(); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert cpu_seconds(process.pid) is not None
    assert cpu_seconds(process.pid) is None


def test_a_name_in_a_report_cannot_become_markup(results) -> None:
    data = json.loads(json.dumps(results["soak"]))
    data["machine"]["cpu"] = "<script>"
    data["contenders"][0]["title"] = "<b>"
    page = render_report(data)
    assert "<script>" not in page
    assert "<b>" not in page


async def _communicate(process: "subprocess.Popen[str]") -> tuple[str, str]:
    return await asyncio.to_thread(process.communicate, timeout=60)
