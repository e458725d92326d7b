"""What a client sees of a stream, byte by byte, and whether that is the truth about it."""

import http.client
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from urllib.parse import urlsplit

from ibex.errors import OperatorError
from ibexctl.bench.callers import CHAT, MODEL

DONE = b"data: [DONE]\n\n"
_TEXT = "A stream that breaks off must not look whole."
_ANSWER_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Sight:
    """What a client saw of one stream."""

    status: int
    body: bytes
    ended_cleanly: bool
    """Whether HTTP's own end came: the terminating chunk."""

    @property
    def events(self) -> list[bytes]:
        """The stream's events, the unfinished rest the last of them, if there is one."""
        *whole, rest = self.body.split(b"\n\n")
        return [*(event + b"\n\n" for event in whole), *([rest] if rest else [])]

    @property
    def looks_whole(self) -> bool:
        """Whether a client would take it for a whole reply."""
        return self.ended_cleanly and self.body.endswith(DONE)

    @property
    def error_code(self) -> str | None:
        """The code of the error that stands in place of the reply, or behind the part of it that came."""
        last = self.events[-1].removeprefix(b"data: ") if self.body else b""
        try:
            return str(json.loads(last)["error"]["code"])
        except (ValueError, KeyError, TypeError):
            return None


def judge(sight: Sight, whole: Sight, at: int) -> str:
    """What came of a stream that was cut at byte `at`: `whole`, `honest`, or what is wrong with it."""
    ends = list(accumulate(len(event) for event in whole.events))
    due = sum(end <= at for end in ends)
    if at >= ends[-1]:
        return "whole" if sight.looks_whole and len(sight.events) == due else "cut short"
    if sight.looks_whole:
        return "looks whole and is not"
    if sight.error_code is None:
        return "no error"
    if sight.status != 200:
        return "honest" if due == 0 else "refused though events had come"
    delivered = sight.events[:-1]
    if len(delivered) != due or sum(map(len, delivered)) != (ends[due - 1] if due else 0):
        return "an event torn, lost or made up"
    return "honest"


def ask(address: str, headers: Mapping[str, str], cut_at: int | None) -> Sight:
    """Ask for a stream that the sandbox breaks off after so many bytes; None: that it sends whole.

    Raises OperatorError when nobody answers.
    """
    parts = urlsplit(address)
    asked: dict[str, object] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": f"Reply with exactly: {_TEXT}"}],
        "stream": True,
        "stream_options": {"include_usage": True},  # else ibex asks for the usage itself, and takes it out again
    }
    if cut_at is not None:
        asked["metadata"] = {"sandbox": json.dumps({"cut_at_byte": cut_at})}
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=_ANSWER_SECONDS)
    try:
        connection.request("POST", CHAT, json.dumps(asked), dict(headers))
        response = connection.getresponse()
        body, ended_cleanly = _read(response)
        return Sight(response.status, body, ended_cleanly)
    except (OSError, http.client.HTTPException) as error:
        raise OperatorError(f"The stream had no answer: {type(error).__name__}.") from None
    finally:
        connection.close()


def _read(response: http.client.HTTPResponse) -> tuple[bytes, bool]:
    body = b""
    try:
        while piece := response.read1():
            body += piece
    except http.client.IncompleteRead as error:
        return body + error.partial, False
    except ConnectionError:
        return body, False
    return body, True
