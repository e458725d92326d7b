"""The chat route end to end: what the client gets, what the provider gets, and what the journal keeps."""

import asyncio
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID, uuid4

import pytest

from ibex.domain.directives import DirectiveMode
from ibex.domain.turns import Outcome
from tests.server.conftest import Edge
from tests.waiting import eventually

LAST = "Connection: close\r\n"


async def test_a_json_reply_is_the_providers_byte_for_byte(edge: Edge) -> None:
    body = '{"id":"x", "choices" : [ ],\n "usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}}'

    status, headers, content = await edge.chat(sandbox={"body": body})

    assert status == 200
    assert content == body.encode()
    turn = edge.last_turn()
    assert headers["x-ibex-turn-id"] == str(turn.turn_id)
    assert (turn.outcome, turn.is_complete, turn.has_checkpoint) == (Outcome.OK, True, True)
    assert (turn.input_tokens, turn.output_tokens, turn.total_tokens, turn.usage_source) == (3, 4, 7, "provider")
    assert turn.provider_request_id == headers["x-provider-request-id"]


async def test_the_turn_is_in_the_journal_when_the_last_byte_comes(edge: Edge) -> None:
    reader, writer = await edge.open_raw()
    writer.write(edge.raw_request(json.dumps({**edge.body, "stream": True}).encode()))

    await reader.readuntil(b"data: [DONE]")

    assert edge.last_turn().outcome is Outcome.OK
    writer.close()


async def test_a_stream_is_the_providers_but_for_the_usage_ibex_asked_for(edge: Edge) -> None:
    _, _, content = await edge.chat(stream=True)
    _, _, with_usage = await edge.chat(stream=True, stream_options={"include_usage": True})

    assert b'"choices":[]' not in content
    assert content.endswith(b"data: [DONE]\n\n")
    assert with_usage.count(b'"choices":[]') == 1
    first, second = edge.turns()
    assert first.usage_source == second.usage_source == "provider"
    assert first.output_tokens == second.output_tokens
    assert first.is_streaming


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
async def test_a_streams_events_come_verbatim(edge: Edge, line_end: str) -> None:
    _, _, content = await edge.chat(stream=True, sandbox={"line_end": line_end, "comments": 2, "piece_bytes": 7})

    assert content.count(b": ") > 2
    assert content.endswith(f"data: [DONE]{line_end}{line_end}".encode())


async def test_the_directive_reaches_the_provider_and_is_stamped(edge: Edge) -> None:
    version = await edge.directives.set(edge.tenant.agent_id, "Answer in verse.", DirectiveMode.SYSTEM_FIRST)

    await edge.chat()

    sent = json.loads(edge.sandbox.requests[-1].body)
    assert sent["messages"][0] == {"role": "system", "content": "Answer in verse."}
    assert sent["messages"][1:] == edge.body["messages"]
    assert edge.last_turn().directive_version == version


async def test_nothing_of_the_clients_headers_reaches_the_provider(edge: Edge) -> None:
    await edge.chat(headers={"X_Secret": "secret", "User_Agent": "mine", "Cookie": "c=1", "OpenAI_Beta": "x=v1"})

    received = {name.lower(): value for name, value in edge.sandbox.requests[-1].headers}
    assert set(received) <= {
        "host", "authorization", "content-type", "accept", "accept-encoding", "user-agent", "content-length",
        "openai-beta", "traceparent",
    }  # fmt: skip
    assert received["user-agent"].startswith("ibex/")
    assert received["accept-encoding"] == "identity"
    assert received["openai-beta"] == "x=v1"


async def test_a_session_is_the_clients_or_a_new_one(edge: Edge) -> None:
    _, given, _ = await edge.chat(headers={"X_IBEX_Session_ID": "thread:7"})
    _, minted, _ = await edge.chat()

    assert given["x-ibex-session-id"] == "thread:7"
    assert len(minted["x-ibex-session-id"]) <= 64
    assert [turn.external_id for turn in edge.turns()] == ["thread:7", minted["x-ibex-session-id"]]


async def test_a_request_id_is_kept_when_it_is_a_uuid_and_replaced_when_not(edge: Edge) -> None:
    mine = str(uuid4())
    _, kept, _ = await edge.chat(headers={"X_Request_ID": mine})
    _, replaced, _ = await edge.chat(headers={"X_Request_ID": "junk"})

    assert kept["x-request-id"] == mine
    assert UUID(replaced["x-request-id"]).version == 7
    assert edge.turns()[0].request_id == UUID(mine)


async def test_one_request_id_a_hundred_times_makes_a_hundred_turns(edge: Edge) -> None:
    mine = str(uuid4())

    await asyncio.gather(*(edge.chat(headers={"X_Request_ID": mine}) for _ in range(100)))

    turns = edge.turns()
    assert len({turn.turn_id for turn in turns}) == 100
    assert {turn.request_id for turn in turns} == {UUID(mine)}


@pytest.mark.parametrize(
    ("sandbox", "status", "code"),
    [
        ({"status": 400}, 400, "INVALID_REQUEST"),
        ({"status": 401}, 503, "PROVIDER_UNAVAILABLE"),
        ({"status": 404}, 503, "PROVIDER_UNAVAILABLE"),
        ({"status": 422}, 422, "INVALID_REQUEST"),
        ({"status": 429, "retry_after": "7"}, 429, "RATE_LIMITED"),
        ({"status": 500}, 503, "PROVIDER_UNAVAILABLE"),
        ({"cut_after": -1}, 503, "PROVIDER_UNAVAILABLE"),
        ({"cut_after": 5}, 503, "PROVIDER_UNAVAILABLE"),
    ],
)
async def test_a_providers_failure_is_told_and_traced_without_a_checkpoint(
    edge: Edge, sandbox: dict, status: int, code: str
) -> None:
    answered, headers, content = await edge.chat(sandbox=sandbox)

    error = json.loads(content)["error"]
    assert (answered, error["code"]) == (status, code)
    assert error["request_id"] == headers["x-request-id"]
    assert headers.get("x-should-retry") == (None if status == 429 else "false")
    assert headers.get("retry-after") == ("7" if status == 429 else None)
    turn = edge.last_turn()
    assert (turn.outcome, turn.has_checkpoint, turn.status_code) == (Outcome.PROVIDER_ERROR, False, status)
    assert (turn.error_code, turn.attempts) == (code, 1)
    assert turn.output_tokens is None


@pytest.mark.parametrize("sandbox", [{"cut_after": 2}, {"error_after": 2}, {"no_done": True, "cut_after": 3}])
async def test_a_broken_stream_ends_with_an_error_item_and_no_end(edge: Edge, sandbox: dict) -> None:
    reader, writer = await edge.open_raw()
    body = {**edge.body, "stream": True, "metadata": {"sandbox": {"events": 6, **sandbox}}}
    writer.write(edge.raw_request(json.dumps(body).encode()))

    received = await reader.read(-1)

    assert b"[DONE]" not in received
    assert not received.endswith(b"0\r\n\r\n")
    error = json.loads(received.rpartition(b"data: ")[2].split(b"\n")[0])["error"]
    assert error["code"] == "PROVIDER_UNAVAILABLE"
    turn = edge.last_turn()
    assert (turn.outcome, turn.is_complete, turn.has_checkpoint) == (Outcome.INCOMPLETE, False, True)
    assert (turn.usage_source, turn.output_tokens) == ("none", None)
    writer.close()


async def test_a_bug_is_a_500_with_an_id_and_ends_the_turn(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(body: bytes) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr("ibex.pipeline.chat.read_usage", stumble)

    status, headers, content = await edge.chat()

    assert (status, json.loads(content)["error"]["code"]) == (500, "INTERNAL_ERROR")
    assert json.loads(content)["error"]["request_id"] == headers["x-request-id"]
    assert b"secret" not in content
    turn = edge.last_turn()
    assert (turn.outcome, turn.has_checkpoint, turn.error_code) == (Outcome.PROVIDER_ERROR, False, "INTERNAL_ERROR")


async def test_a_stream_without_done_is_whole_when_every_choice_has_finished(edge: Edge) -> None:
    status, _, content = await edge.chat(stream=True, sandbox={"no_done": True})

    assert status == 200
    assert b"error" not in content
    assert edge.last_turn().outcome is Outcome.OK


async def test_a_client_that_leaves_a_stream_cancels_the_provider(edge: Edge) -> None:
    reader, writer = await edge.open_raw()
    body = {**edge.body, "stream": True, "metadata": {"sandbox": {"events": 1000, "gap_ms": 20}}}
    writer.write(edge.raw_request(json.dumps(body).encode()))
    await reader.readuntil(b"data: ")
    assert edge.sandbox.open_connections == 1

    writer.transport.abort()

    await eventually(lambda: edge.sandbox.open_connections == 0)
    turn = edge.last_turn()
    assert (turn.outcome, turn.is_complete, turn.has_checkpoint) == (Outcome.CLIENT_DISCONNECT, False, True)


async def test_a_client_that_leaves_before_an_answer_leaves_a_trace_alone(edge: Edge) -> None:
    _, writer = await edge.open_raw()
    body = {**edge.body, "metadata": {"sandbox": {"delay_ms": 30_000}}}
    writer.write(edge.raw_request(json.dumps(body).encode()))
    await eventually(lambda: edge.sandbox.open_connections == 1)

    writer.transport.abort()

    await eventually(lambda: edge.sandbox.open_connections == 0)
    await eventually(edge.turns)
    turn = edge.last_turn()
    assert (turn.outcome, turn.has_checkpoint, turn.status_code) == (Outcome.CLIENT_DISCONNECT, False, 499)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_idempotent_replay_is_the_first_reply_again(edge: Edge, stream: bool) -> None:
    key = {"Idempotency_Key": f"k-{stream}"}
    _, first_headers, first = await edge.chat(stream=stream, headers=key)
    asked = len(edge.sandbox.requests)

    status, headers, again = await edge.chat(stream=stream, headers=key)

    assert status == 200
    assert again == first
    assert len(edge.sandbox.requests) == asked
    assert headers["x-ibex-replayed"] == "true"
    assert headers["x-ibex-turn-id"] == first_headers["x-ibex-turn-id"]
    assert headers["x-ibex-session-id"] == first_headers["x-ibex-session-id"]
    turn, replay = edge.turns()
    assert (replay.outcome, replay.has_checkpoint, replay.replay_of) == (Outcome.REPLAYED, False, turn.turn_id)
    assert replay.turn_id != turn.turn_id


async def test_an_idempotency_key_is_not_taken_for_another_body_and_is_freed_by_a_failure(edge: Edge) -> None:
    key = {"Idempotency_Key": "k"}
    failed, _, _ = await edge.chat(headers=key, sandbox={"status": 400})
    served, _, _ = await edge.chat(headers=key)
    refused, _, content = await edge.chat(headers=key, temperature=1)

    assert (failed, served, refused) == (400, 200, 409)
    assert json.loads(content)["error"]["code"] == "IDEMPOTENCY_KEY_REUSE"


async def test_a_malformed_session_is_refused_where_a_reply_could_be_replayed_too(edge: Edge) -> None:
    await edge.chat(headers={"Idempotency_Key": "k"})

    for malformed in ("", "a b", "x" * 65):
        status, _, content = await edge.chat(headers={"Idempotency_Key": "k", "X_IBEX_Session_ID": malformed})
        assert (status, json.loads(content)["error"]["param"]) == (400, "X-IBEX-Session-ID")


async def test_an_upstream_that_refuses_to_tell_usage_is_asked_for_it_once(edge: Edge) -> None:
    for _ in range(3):
        status, _, content = await edge.chat(stream=True, sandbox={"refuse_stream_options": True})
        assert (status, content.endswith(b"data: [DONE]\n\n")) == (200, True)

    asked = ["stream_options" in json.loads(request.body) for request in edge.sandbox.requests]
    assert asked == [True, False, False, False]
    assert [(turn.attempts, turn.usage_source) for turn in edge.turns()] == [(2, "none"), (1, "none"), (1, "none")]


@pytest.mark.parametrize("edge", [{"journal_min_free_bytes": 1 << 60}], indirect=True)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_journal_that_takes_no_turn_refuses_before_forwarding(edge: Edge, stream: bool) -> None:
    status, headers, content = await edge.chat(stream=stream)

    assert (status, json.loads(content)["error"]["code"]) == (503, "SERVICE_DEGRADED")
    assert "x-should-retry" not in headers
    assert len(edge.sandbox.requests) == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_when_the_turn_cannot_be_kept_the_end_never_leaves(edge: Edge, stream: bool) -> None:
    await edge.chat()
    reader, writer = await edge.open_raw()

    with _no_room_on_disk():
        writer.write(edge.raw_request(json.dumps({**edge.body, "stream": stream}).encode(), headers=LAST))
        received = await reader.read(-1)

    assert b"SERVICE_DEGRADED" in received
    assert b"[DONE]" not in received
    assert not received.endswith(b"0\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 200" if stream else b"HTTP/1.1 503")
    assert (b"IBEX_OK" in received) is stream
    assert len(edge.turns()) == 1
    writer.close()
    async with asyncio.timeout(20):
        while (await edge.chat())[0] != 200:  # noqa: ASYNC110 - there is nothing that could be awaited
            await asyncio.sleep(0.1)  # until the journal has seen that there is room again


@pytest.mark.parametrize(("stream", "trouble"), [(False, {"status": 422}), (True, {"cut_after": 3})])
async def test_a_failure_is_told_when_its_turn_is_kept_and_not_before(
    edge: Edge, stream: bool, trouble: dict[str, int]
) -> None:
    await edge.chat()
    reader, writer = await edge.open_raw()
    body = {**edge.body, "stream": stream, "metadata": {"sandbox": json.dumps(trouble)}}

    with _no_room_on_disk():
        writer.write(edge.raw_request(json.dumps(body).encode(), headers=LAST))
        received = await reader.read(-1)

    assert b"SERVICE_DEGRADED" in received
    assert b"INVALID_REQUEST" not in received
    assert b"PROVIDER_UNAVAILABLE" not in received
    assert len(edge.turns()) == 1
    writer.close()


@contextmanager
def _no_room_on_disk() -> Iterator[None]:
    """No file of this process may grow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_model_the_provider_does_not_know_is_named(edge: Edge) -> None:
    status, _, content = await edge.chat(model="no-such-model-1")

    error = json.loads(content)["error"]
    assert (status, error["code"], error["param"]) == (404, "MODEL_NOT_FOUND", "model")


async def test_a_large_reply_is_relayed_and_its_last_byte_held(edge: Edge) -> None:
    long = [{"role": "user", "content": "Reply with exactly: " + "x" * (800 << 10)}]
    status, headers, content = await edge.chat(messages=long, n=4)

    assert status == 200
    assert len(content) == int(headers["content-length"]) > 3 << 20
    assert json.loads(content)["choices"]
    assert edge.last_turn().is_complete


async def test_the_stages_and_the_overhead_are_counted(edge: Edge) -> None:
    await edge.chat()

    turn = edge.last_turn()
    assert turn.auth_latency_us > 0
    assert turn.rate_limit_latency_us > 0
    assert 0 < turn.overhead_latency_us <= turn.total_latency_ms * 1000
    assert turn.provider_ttfb_ms is not None
    assert sum(edge.metrics.overhead_seconds.labels("false").counts) == 1
    assert edge.metrics.tokens_total.labels("openai", "gpt-4o-mini", "output").value == turn.output_tokens


async def test_a_callers_trace_goes_on(edge: Edge) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"

    _, headers, _ = await edge.chat(headers={"traceparent": parent})

    assert headers["x-trace-id"] == "0af7651916cd43dd8448eb211c80319c"
    sent = {name.lower(): value for name, value in edge.sandbox.requests[-1].headers}
    assert sent["traceparent"] == parent
