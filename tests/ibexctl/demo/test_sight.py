"""What counts as an honest end of a stream."""

import json
from dataclasses import replace

import pytest

from ibexctl.demo.sight import DONE, Sight, judge

EVENTS = [b'data: {"n": %d}\n\n' % number for number in range(3)]
WHOLE = Sight(200, b"".join(EVENTS) + DONE, ended_cleanly=True)
ERROR = b'data: {"error": {"code": "PROVIDER_UNAVAILABLE"}}\n\n'
IN_THE_SECOND = len(EVENTS[0]) + 5


def test_whole_events_and_an_error_are_honest() -> None:
    assert judge(Sight(200, EVENTS[0] + ERROR, ended_cleanly=False), WHOLE, IN_THE_SECOND) == "honest"
    assert judge(Sight(200, ERROR, ended_cleanly=False), WHOLE, 0) == "honest"
    assert judge(Sight(503, json.dumps({"error": {"code": "X"}}).encode(), ended_cleanly=True), WHOLE, 3) == "honest"
    assert judge(WHOLE, WHOLE, len(WHOLE.body)) == "whole"


@pytest.mark.parametrize(
    ("body", "verdict"),
    [
        (EVENTS[0] + EVENTS[1][:5], "no error"),
        (EVENTS[0], "no error"),
        (EVENTS[0] + DONE, "looks whole and is not"),
        (ERROR, "an event torn, lost or made up"),
        (EVENTS[0] + EVENTS[1] + ERROR, "an event torn, lost or made up"),
        (EVENTS[0][:-4] + b"}\n\n" + ERROR, "an event torn, lost or made up"),
    ],
)
def test_anything_else_is_not(body: bytes, verdict: str) -> None:
    sight = Sight(200, body, ended_cleanly=body.endswith(DONE))
    assert judge(sight, WHOLE, IN_THE_SECOND) == verdict


def test_a_whole_stream_must_arrive_whole() -> None:
    assert judge(replace(WHOLE, ended_cleanly=False), WHOLE, len(WHOLE.body)) == "cut short"
