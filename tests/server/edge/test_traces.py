"""Traces through the whole chain: from the caller's context to the provider's, and spans at a real OTLP receiver."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from ibex.config import Settings
from ibex.server.supervision.launching import WORKER
from tests.server.conftest import Edge
from tests.server.nodes import running
from tests.telemetry.otlp import Receiver, attributes, http_receiver
from tests.waiting import eventually

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


PORT = _free_port()
NO_CHANCE = [{"otel_endpoint": f"http://127.0.0.1:{PORT}", "otel_sample_ratio": 0.0}]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with http_receiver(PORT) as found:
        yield found


def told_provider(edge: Edge) -> dict[str, str]:
    """The headers of the last request the upstream was sent."""
    return {name.lower(): value for name, value in edge.sandbox.requests.last(1)[0].headers}


async def spans_of(receiver: Receiver, trace_id: str) -> dict[str, Any]:
    """A trace's spans by name, once the model call's is among them."""

    def found() -> dict[str, Any]:
        return {span.name: span for span in receiver.spans if span.trace_id.hex() == trace_id}

    await eventually(lambda: any(name.startswith("chat ") for name in found()))
    return found()


@pytest.mark.parametrize("edge", NO_CHANCE, indirect=True)
@pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
async def test_a_callers_trace_goes_on_through_ibex_to_the_provider(
    edge: Edge, receiver: Receiver, stream: bool
) -> None:
    given = {"traceparent": PARENT, "tracestate": "vendor=1", "X-IBEX-Session-ID": "s-9"}

    status, headers, _ = await edge.chat(headers=given, stream=stream)

    assert (status, headers["x-trace-id"]) == (200, TRACE)
    spans = await spans_of(receiver, TRACE)
    server, call = spans["POST /v1/chat/completions"], spans["chat gpt-4o-mini"]
    assert server.parent_span_id.hex() == "b7ad6b7169203331"
    assert call.parent_span_id == server.span_id
    told = told_provider(edge)
    assert told["traceparent"] == f"00-{TRACE}-{call.span_id.hex()}-01"
    assert told["tracestate"] == "vendor=1"
    turn, facts = edge.last_turn(), attributes(call)
    assert facts["gen_ai.conversation.id"] == "s-9"
    assert facts["gen_ai.usage.input_tokens"] == turn.input_tokens
    assert facts["gen_ai.usage.output_tokens"] == turn.output_tokens
    assert facts["gen_ai.response.model"] == "gpt-4o-mini"
    assert facts["gen_ai.response.finish_reasons"] == ["stop"]
    assert facts["server.port"] == int(edge.sandbox.base_url.rpartition(":")[2].partition("/")[0])
    assert attributes(server)["ibex.turn_id"] == str(turn.turn_id) == headers["x-ibex-turn-id"]
    assert {"authentication", "rate_limit", "directive", "read", "weave", "relay"} < set(spans)


@pytest.mark.parametrize("edge", NO_CHANCE, indirect=True)
@pytest.mark.parametrize(
    ("sandbox", "stream", "status", "error"),
    [({"status": 500}, False, 503, "PROVIDER_UNAVAILABLE"), ({"cut_after": 1}, True, 200, "PROVIDER_UNAVAILABLE")],
    ids=["refused", "cut"],
)
async def test_a_failure_is_kept_though_nothing_is_sampled(
    edge: Edge, receiver: Receiver, sandbox: dict[str, Any], stream: bool, status: int, error: str
) -> None:
    assert (await edge.chat())[0] == 200  # leaves nothing

    if stream:
        _, writer = connection = await edge.open_raw()
        body = {**edge.body, "stream": True, "metadata": {"sandbox": sandbox}}
        writer.write(edge.raw_request(json.dumps(body).encode()))
        head = await connection[0].readuntil(b"\r\n\r\n")
        trace_id = head.decode().partition("X-Trace-ID: ")[2][:32]
        writer.close()
    else:
        answered, headers, _ = await edge.chat(sandbox=sandbox)
        assert answered == status
        trace_id = headers["x-trace-id"]

    spans = await spans_of(receiver, trace_id)
    server, call = spans["POST /v1/chat/completions"], spans["chat gpt-4o-mini"]
    assert (server.status.code, call.status.code) == (2, 2)
    assert attributes(call)["error.type"] == error
    assert attributes(server)["http.response.status_code"] == status
    assert {span.trace_id.hex() for span in receiver.spans} == {trace_id}
    assert told_provider(edge)["traceparent"] == f"00-{trace_id}-{call.span_id.hex()}-02"


@pytest.mark.parametrize("edge", [{**NO_CHANCE[0], "otel_sample_ratio": 1.0}], indirect=True)
async def test_probes_leave_spans_only_where_their_caller_traces_them(edge: Edge, receiver: Receiver) -> None:
    for path, given in (("/health", {}), ("/ready", {}), ("/health", {"traceparent": PARENT}), ("/nowhere", {})):
        async with edge.http.get(edge.url + path, headers=given):
            pass
    await edge.server.close()

    assert sorted(span.name for span in receiver.spans) == ["GET", "GET /health"]
    assert edge.metrics.otel_spans_total.labels("exported").value == 2


@pytest.mark.parametrize("edge", NO_CHANCE, indirect=True)
async def test_the_time_a_failing_provider_takes_is_not_ibexs_own(edge: Edge) -> None:
    await edge.chat(sandbox={"status": 500, "delay_ms": 300})

    assert edge.last_turn().overhead_latency_us < 250_000
    assert edge.metrics.overhead_seconds.labels("false").total < 0.25


async def test_a_stopping_node_sends_the_spans_it_holds(production: Settings) -> None:
    with http_receiver() as collector:
        traced = production.model_copy(update={"otel_endpoint": collector.endpoint})
        async with running(traced, worker=WORKER) as node:
            async with node.http.get(f"{node.status.url}/health", headers={"traceparent": PARENT}) as response:
                assert response.headers["X-Trace-ID"] == TRACE
            await node.stop()

    assert "GET /health" in {span.name for span in collector.spans if span.trace_id.hex() == TRACE}
