"""What commands print: JSON values, plain text for pipes, nothing that steers a terminal."""

import json
from datetime import UTC, datetime, timedelta, timezone
from enum import StrEnum
from uuid import UUID

import pytest

from ibexctl.output import Answer, Fields, Table, cell, encode, format_time, printable, show, show_error


class Colour(StrEnum):
    RED = "red"


def test_times_are_rfc_3339_in_utc_with_milliseconds() -> None:
    assert format_time(datetime(2026, 1, 31, 12, 0, 0, 123_999, UTC)) == "2026-01-31T12:00:00.123Z"
    assert format_time(datetime(2026, 1, 31, 14, 0, tzinfo=timezone(timedelta(hours=2)))) == "2026-01-31T12:00:00.000Z"
    assert format_time(datetime(2026, 1, 31)) == "2026-01-31T00:00:00.000Z"


def test_json_holds_ids_as_text_bytes_as_hex_and_null_for_none() -> None:
    data = {
        "org_id": UUID(int=1),
        "sha256": b"\x00\xff",
        "mode": Colour.RED,
        "span": timedelta(minutes=1),
        "none": None,
        "yes": True,
        "list": (1, 2.5, "ä"),
    }
    assert json.loads(encode(data)) == {
        "org_id": "00000000-0000-0000-0000-000000000001",
        "sha256": "00ff",
        "mode": "red",
        "span": 60.0,
        "none": None,
        "yes": True,
        "list": [1, 2.5, "ä"],
    }


def test_json_is_one_line_and_notes_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    show(Answer({"name": "two\nlines"}, ("text",), ("a note",)), is_json=True)
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"name": "two\nlines"}
    assert captured.out.count("\n") == 1
    assert captured.err == ""


def test_a_pipe_gets_tab_separated_rows_under_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("acme", None, True), ("b\tc", 1.5, ["x", "y"])]
    show(
        Answer({}, (Fields({"org_id": UUID(int=1)}), "", Table(("name", "rpm", "on"), rows)), ("next",)), is_json=False
    )
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "org_id\t00000000-0000-0000-0000-000000000001",
        "",
        "name\trpm\ton",
        "acme\t\tyes",
        "b\\tc\t1.5\tx, y",
    ]
    assert captured.err == "next\n"


def test_stored_text_cannot_steer_a_terminal() -> None:
    assert printable("\x1b[2Jevil\u202e\r\n") == "\\x1b[2Jevil\\u202e\\r\\n"
    assert cell({"name": "\x07"}) == "name \\x07"


def test_errors_name_what_to_do_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    show_error("It failed.\nTwice.", "Try again.", is_json=False)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: It failed.\n       Twice.\n hint: Try again.\n"


def test_errors_are_one_json_object_too(capsys: pytest.CaptureFixture[str]) -> None:
    show_error("It failed.", None, is_json=True)
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"error": {"message": "It failed.", "hint": None}}
    assert captured.err == ""


def test_an_error_quotes_of_a_token_its_prefix_alone(capsys: pytest.CaptureFixture[str]) -> None:
    prefix = "ibex_pat_2f1c6a0e-6f0b-4a53-9a0e-0d7f3c1b2a4d"
    show_error(f"'{prefix}_aB-3_x' is no UUID.", None, is_json=False)
    assert capsys.readouterr().err == f"error: '{prefix}_…' is no UUID.\n"


def test_a_person_sees_an_aligned_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("ibexctl.output.is_terminal", lambda _stream: True)
    monkeypatch.setenv("NO_COLOR", "1")
    table = Table(("name", "rpm"), [("[bold]acme", 5)])
    show(Answer({}, (table, Fields({"org_id": 7}), Table(("x",), [], empty="None yet."))), is_json=False)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["name        rpm", "[bold]acme  5", "org_id  7", "None yet."]
