"""Load on a running ibex over HTTP by many users: sessions, JSON and streams, checked to their last byte.

    locust -f loadtests/locustfile.py --headless -u 100 -r 100 -t 60s -H http://127.0.0.1:8080

The organization's limit must leave room: `ibexctl org limit ORG --rpm 1000000`. Against a real provider this costs
real money; with `IBEX_LLM_MODE=sandbox` it costs none. `ibexctl bench overhead` runs this file against a server of its
own and says what ibex adds.
"""

import itertools
import json
import time
from pathlib import Path
from secrets import token_hex
from typing import Any

from locust import FastHttpUser, events, task
from locust.argument_parser import LocustArgumentParser

from ibex.domain.identity import DEV_AGENT_ID, DEV_TOKEN

CHAT = "/v1/chat/completions"
DONE = b"data: [DONE]"


@events.init_command_line_parser.add_listener
def add_options(parser: LocustArgumentParser) -> None:
    """Who calls, what is asked, how much of it is streamed, and how quickly one asks again."""
    parser.add_argument(
        "--ibex-token", env_var="IBEX_DEV_TOKEN", default=DEV_TOKEN, is_secret=True, help="bearer token"
    )
    parser.add_argument("--ibex-agent", env_var="IBEX_DEV_AGENT_ID", default=str(DEV_AGENT_ID), help="agent id")
    parser.add_argument("--token-file", default="", help="a file with one bearer token a line, used in turn")
    parser.add_argument("--model", default="gpt-4o-mini", help="model to ask for")
    parser.add_argument("--prompt", default="Reply with exactly: IBEX_OK", help="the user message")
    parser.add_argument("--stream-share", type=int, default=50, help="share of chats that stream (percent)")
    parser.add_argument("--session-turns", type=int, default=20, help="turns after which a user begins a new session")
    parser.add_argument("--think-ms", type=float, default=0.0, help="wait between an answer and the next question (ms)")
    parser.add_argument("--sandbox-delay-ms", type=float, default=0.0, help="how long an ibex sandbox is to wait (ms)")


class Caller(FastHttpUser):
    """One agent's client on one kept-alive connection, whose conversations each have a session."""

    numbers = itertools.count()

    def wait_time(self) -> float:
        """Seconds between an answer and the next question."""
        return float(self.environment.parsed_options.think_ms) / 1000

    def on_start(self) -> None:
        """Write the two bodies and the headers once."""
        options = self.environment.parsed_options
        number = next(self.numbers)
        asked: dict[str, Any] = {"model": options.model, "messages": [{"role": "user", "content": options.prompt}]}
        if options.sandbox_delay_ms:
            asked["metadata"] = {"sandbox": json.dumps({"delay_ms": options.sandbox_delay_ms})}
        self.json_body = json.dumps(asked)
        self.stream_body = json.dumps({**asked, "stream": True})
        self.call_headers = {
            "Authorization": f"Bearer {find_token(options, number)}",
            "X-IBEX-Agent-ID": options.ibex_agent,
            "Content-Type": "application/json",
        }
        self.stream_share = options.stream_share
        self.session_turns = options.session_turns
        self.asked = number  # not all users stream in the same turn

    @task
    def chat(self) -> None:
        """Ask once; every so-manieth chat streams, evenly spread."""
        self.asked += 1
        if "X-IBEX-Session-ID" not in self.call_headers or self.asked % self.session_turns == 0:
            self.call_headers["X-IBEX-Session-ID"] = f"locust-{token_hex(8)}"
        is_streaming = self.asked * self.stream_share // 100 > (self.asked - 1) * self.stream_share // 100
        if is_streaming:
            self._ask_for_stream()
        else:
            self._ask_for_json()

    def _ask_for_json(self) -> None:
        with self.client.post(
            CHAT, data=self.json_body, headers=self.call_headers, name="chat", catch_response=True
        ) as reply:
            if reply.status_code != 200:
                reply.failure(f"status {reply.status_code}")
            elif not reply.json().get("choices"):
                reply.failure("no choices")

    def _ask_for_stream(self) -> None:
        """`stream: head` ends with the response's head, `stream: whole` with `[DONE]`."""
        begun = time.perf_counter()
        with self.client.post(
            CHAT,
            data=self.stream_body,
            headers=self.call_headers,
            name="stream: head",
            stream=True,
            catch_response=True,
        ) as reply:
            if reply.status_code != 200:
                reply.failure(f"status {reply.status_code}")
                return
            received = b"".join(reply.iter_content(65_536, decode_content=False))
        has_ended = received.rstrip().endswith(DONE)
        events.request.fire(
            request_type="POST",
            name="stream: whole",
            response_time=(time.perf_counter() - begun) * 1000,
            response_length=len(received),
            exception=None if has_ended else RuntimeError("the stream ended without [DONE]"),
            context={},
        )


def find_token(options: Any, number: int) -> str:
    """The bearer of the user with this number."""
    if not options.token_file:
        return str(options.ibex_token)
    tokens = Path(options.token_file).read_text().split()
    return tokens[number % len(tokens)]
