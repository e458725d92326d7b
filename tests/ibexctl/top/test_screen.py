"""The screen of `ibexctl top`: what it shows, and that it fits whatever terminal there is."""

import io
from dataclasses import replace
from datetime import UTC, datetime
from uuid import uuid4

import pytest
from rich.console import Console

from ibexctl.top.sample import Caches, Check, Journal, Latency, Leader, Limits, Process, Sample, Traffic
from ibexctl.top.screen import Screen

NAMES = ("supervisor", "worker 0", "worker 1", "recorder", "engine postgres", "engine valkey", "engine clickhouse")


def process(name: str, **more: object) -> Process:
    facts = {"pid": 4321, "is_up": True, "uptime_seconds": 61.0, "restarts": 0, "cpu": 0.25, "memory_bytes": 80 << 20}
    return Process(name=name, in_flight=7 if name.startswith("worker") else None, **facts | more)  # type: ignore[arg-type]


SAMPLE = Sample(
    at=datetime(2026, 1, 31, 12, 0, 5, tzinfo=UTC),
    seconds=5.0,
    version="1.2.3",
    env="production",
    url="http://127.0.0.1:8080",
    upstream="https://api.openai.com/v1",
    uptime_seconds=3_600.0,
    state="ok",
    traffic=Traffic(
        requests=1234.5, streams=20.0, in_flight=14, open_streams=9, connections=40,
        errors={"429": 3.0, "503": 12.0}, hang_ups=0.0, input_tokens=54_000.0, output_tokens=800.0,
    ),
    latency={
        "request": Latency(p50_ms=420.0, p99_ms=2_500.0),
        "overhead": Latency(p50_ms=0.31, p99_ms=1.25),
        "first_byte": Latency(p50_ms=None, p99_ms=None),
    },
    caches=Caches(auth=0.998, directive=None),
    limits=Limits(denied=3.0, redis_errors=0.0),
    journal=Journal(pending_turns=1_500, oldest_seconds=2.0, bytes=3 << 30, max_bytes=4 << 30, dead_letters=0),
    checks=[Check(name="postgres", status="ok", message=None, latency_ms=3.2),
            Check(name="clickhouse", status="unhealthy", message="ClickHouse is away.", latency_ms=None)],
    processes=[process(name) for name in NAMES],
    leaders=[Leader(org_id=uuid4(), name=f"tenant {k}", turns=100 - k, errors=k, tokens=9_000, p50_ms=5.0)
             for k in range(30)],
    leaders_missing=None,
)  # fmt: skip


def draw(sample: Sample, width: int, height: int, *, trouble: str | None = None) -> list[str]:
    screen = Screen(2.0)
    screen.take(sample)
    console = Console(width=width, height=height, file=io.StringIO(), record=True, force_terminal=True)
    console.print(screen.render(width, height, trouble=trouble))
    return console.export_text().rstrip("\n").splitlines()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 60), (60, 18), (300, 24), (40, 14)])
def test_it_fits_the_terminal(width: int, height: int) -> None:
    lines = draw(SAMPLE, width, height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width


def test_at_80_by_24_everything_that_matters_is_seen() -> None:
    text = "\n".join(draw(SAMPLE, 80, 24))
    for said in ("1,234/s", "54.0k in 800 out", "14 in flight, 9 streams", "503 12  429 3", "0.31", "1.25", "99.8 %",
                 "clickhouse: Cl", "1,500 turns wait", "3,072 MiB of 4,096", "worker 1", "25%", "tenant 0",
                 "q quits"):  # fmt: skip
        assert said in text, said


def test_a_larger_terminal_shows_more_organizations() -> None:
    few, many = (sum("tenant" in line for line in draw(SAMPLE, 80, height)) for height in (24, 50))
    assert 2 <= few < many == 30


def test_processes_that_are_down_come_first_when_there_is_no_room_for_all() -> None:
    workers = [process(f"worker {k}", cpu=k / 100) for k in range(64)]
    crowd = replace(SAMPLE, processes=[*workers, process("recorder", is_up=False, pid=None, cpu=None)])
    shown = [line.split()[:2] for line in draw(crowd, 80, 24) if line.startswith((" worker", " recorder"))]
    assert shown[:2] == [["recorder", "down"], ["worker", "63"]]


def test_what_is_away_is_said_in_its_place() -> None:
    away = replace(SAMPLE, leaders=None, leaders_missing="ClickHouse is away.", checks=[])
    text = "\n".join(draw(away, 80, 24, trouble="no server answers"))
    assert "● no server answers" in text
    assert "/ready does not answer" in text
    assert text.count("ClickHouse is away.") == 1


def test_a_name_cannot_steer_the_terminal() -> None:
    hostile = replace(SAMPLE.leaders[0], name="x\x1b[2Jy")  # type: ignore[index]
    assert "x\\x1b[2Jy" in "\n".join(draw(replace(SAMPLE, leaders=[hostile]), 80, 24))
