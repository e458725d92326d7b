"""Which requests leave spans, what these say, and W3C's context in and out."""

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import pytest

from ibex.config import Settings, load_settings
from ibex.domain.completions import ReplyFacts
from ibex.domain.turns import Outcome, Turn
from ibex.errors import ConfigurationError
from ibex.telemetry import Metrics, RequestFacts, RequestTrace, Stage, StageClock, Tracing
from ibex.telemetry.trace_context import parse_traceparent
from tests.telemetry.otlp import RECEIVERS, Receiver, attributes, http_receiver
from tests.turns import make_turn

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"
UNSAMPLED = PARENT[:-2] + "00"
REQUEST_ID = UUID(int=7)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with http_receiver() as found:
        yield found


@asynccontextmanager
async def tracing_to(receiver: Receiver, **changes: Any) -> AsyncIterator[Tracing]:
    """Tracing that has sent everything when this is over."""
    tracing = Tracing(
        Settings(**{"otel_endpoint": receiver.endpoint, "otel_sample_ratio": 1.0, **changes}), "worker 0", Metrics()
    )
    try:
        yield tracing
    finally:
        await tracing.close()


def begin(tracing: Tracing, traceparent: str | None = None, tracestate: str | None = None) -> RequestTrace:
    given = {"traceparent": traceparent, "tracestate": tracestate}
    trace = tracing.begin({name: value for name, value in given.items() if value is not None})
    assert trace is not None
    return trace


def end(tracing: Tracing, trace: RequestTrace, *, status: int = 200, turn: Turn | None = None) -> None:
    """What the middleware does with a request that is over."""
    trace.turn = turn
    clock = StageClock(time.perf_counter() - 0.02, time.time() - 0.02)
    for stage in (Stage.AUTHENTICATION, Stage.RATE_LIMIT, Stage.DIRECTIVE, Stage.READ, Stage.WEAVE):
        clock.finish(stage)
    if tracing.keeps(trace, status):
        error_code = None if turn is None else turn.error_code
        facts = RequestFacts("POST", "/v1/chat/completions", status, error_code, REQUEST_ID)
        tracing.record(trace, clock, facts)


@pytest.mark.parametrize("protocol", RECEIVERS)
async def test_a_request_is_a_tree_of_spans_at_a_real_receiver(protocol: str) -> None:
    with RECEIVERS[protocol]() as receiver:
        async with tracing_to(receiver, otel_protocol=protocol, otel_headers="x-key=a%20b, tenant=t") as tracing:
            trace = begin(tracing, PARENT)
            end(tracing, trace, turn=make_turn())

    spans = receiver.by_name()
    server, call = spans["POST /v1/chat/completions"], spans["chat gpt-4o-mini"]
    assert set(spans) == {server.name, call.name, "authentication", "rate_limit", "directive", "read", "weave"}
    assert {span.trace_id.hex() for span in receiver.spans} == {TRACE} == {trace.trace_id_hex}
    assert server.parent_span_id.hex() == "b7ad6b7169203331"
    assert {span.parent_span_id for span in receiver.spans if span is not server} == {server.span_id}
    assert trace.traceparent == f"00-{TRACE}-{call.span_id.hex()}-01"
    assert (server.kind, call.kind, spans["read"].kind) == (2, 3, 1)
    assert (server.status.code, call.status.code) == (0, 0)
    assert server.start_time_unix_nano < call.start_time_unix_nano <= call.end_time_unix_nano
    assert (receiver.headers["x-key"], receiver.headers["tenant"]) == ("a b", "t")


async def test_the_call_is_described_as_the_genai_conventions_have_it(receiver: Receiver) -> None:
    turn = make_turn(is_streaming=True, cached_tokens=4, attempts=3, directive_version=2)
    async with tracing_to(receiver, openai_base_url="https://llm.example/v1") as tracing:
        trace = begin(tracing)
        trace.reply = ReplyFacts("chatcmpl-1", "gpt-4o-mini-2024", ("stop", "length"))
        end(tracing, trace, turn=turn)

    assert attributes(receiver.by_name()["chat gpt-4o-mini"]) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "gpt-4o-mini",
        "gen_ai.request.stream": True,
        "gen_ai.conversation.id": "s-1",
        "gen_ai.usage.input_tokens": 10,
        "gen_ai.usage.output_tokens": 20,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "gen_ai.response.id": "chatcmpl-1",
        "gen_ai.response.model": "gpt-4o-mini-2024",
        "gen_ai.response.finish_reasons": ["stop", "length"],
        "gen_ai.response.time_to_first_chunk": 0.0035,
        "server.address": "llm.example",
        "server.port": 443,
        "http.request.resend_count": 2,
    }
    assert attributes(receiver.by_name()["POST /v1/chat/completions"]) == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": "/v1/chat/completions",
        "url.scheme": "http",
        "ibex.request_id": str(REQUEST_ID),
        "ibex.turn_id": str(turn.turn_id),
        "ibex.org_id": str(turn.org_id),
        "ibex.agent_id": str(turn.agent_id),
        "ibex.directive_version": 2,
        "ibex.outcome": "ok",
    }


@pytest.mark.parametrize("traceparent", [None, UNSAMPLED], ids=["by chance", "by its caller"])
@pytest.mark.parametrize(
    ("status", "turn", "error", "is_fault"),
    [
        (503, None, "503", True),
        (504, make_turn(outcome=Outcome.PROVIDER_ERROR, error_code="PROVIDER_TIMEOUT"), "PROVIDER_TIMEOUT", True),
        (200, make_turn(outcome=Outcome.INCOMPLETE, error_code="PROVIDER_UNAVAILABLE"), "PROVIDER_UNAVAILABLE", True),
        (400, make_turn(outcome=Outcome.PROVIDER_ERROR, error_code="INVALID_REQUEST"), "INVALID_REQUEST", False),
    ],
    ids=["refused by ibex", "provider away", "cut stream", "refused by the provider"],
)
async def test_a_failure_is_kept_though_it_is_not_sampled(
    receiver: Receiver, traceparent: str | None, status: int, turn: Turn | None, error: str, is_fault: bool
) -> None:
    async with tracing_to(receiver, otel_sample_ratio=0.0) as tracing:
        trace = begin(tracing, traceparent)
        end(tracing, trace, status=status, turn=turn)

    spans = receiver.by_name()
    assert not trace.is_sampled
    assert (spans["POST /v1/chat/completions"].status.code == 2) is is_fault
    told = spans["POST /v1/chat/completions"] if turn is None else spans["chat gpt-4o-mini"]
    assert attributes(told)["error.type"] == error
    assert told.status.code == 2


@pytest.mark.parametrize(
    ("status", "turn"),
    [(200, None), (429, None), (499, make_turn(outcome=Outcome.CLIENT_DISCONNECT)), (200, make_turn())],
)
async def test_what_is_neither_sampled_nor_a_failure_leaves_nothing(
    receiver: Receiver, status: int, turn: Turn | None
) -> None:
    async with tracing_to(receiver, otel_sample_ratio=0.0) as tracing:
        end(tracing, begin(tracing), status=status, turn=turn)
        end(tracing, begin(tracing, UNSAMPLED), status=status, turn=turn)

    assert receiver.spans == []


async def test_a_replay_called_no_model(receiver: Receiver) -> None:
    async with tracing_to(receiver) as tracing:
        end(tracing, begin(tracing), turn=make_turn(outcome=Outcome.REPLAYED))

    assert [name for name in receiver.by_name() if name.startswith("chat")] == []


async def test_the_share_of_traces_that_begin_here_is_the_settings(receiver: Receiver) -> None:
    async with tracing_to(receiver, otel_sample_ratio=0.25) as tracing:
        sampled = sum(begin(tracing).is_sampled for _ in range(4000))

    assert 800 < sampled < 1200


async def test_the_context_goes_on_to_the_provider_as_w3c_has_it(receiver: Receiver) -> None:
    async with tracing_to(receiver, otel_sample_ratio=0.0) as tracing:
        named, own = begin(tracing, PARENT[:-2] + "03", "vendor=1,other=2"), begin(tracing)
        strange = begin(tracing, PARENT, "vendor=\u00e9")

    assert named.traceparent == f"00-{TRACE}-{named.call_span_id:016x}-03"
    assert named.tracestate == "vendor=1,other=2"
    assert strange.tracestate is None
    assert own.traceparent == f"00-{own.trace_id_hex}-{own.call_span_id:016x}-02"
    assert begin(tracing, UNSAMPLED).traceparent.endswith("-00")


def test_without_a_collector_a_callers_words_go_on_unchanged() -> None:
    for tracing in (
        Tracing(Settings(), "worker 0", Metrics()),
        Tracing(Settings(otel_endpoint="http://127.0.0.1:9", otel_sdk_disabled=True), "worker 0", Metrics()),
    ):
        trace = begin(tracing, PARENT, "vendor=1")

        assert not tracing.keeps(trace, 503)
        assert (trace.traceparent, trace.tracestate) == (PARENT, "vendor=1")
        assert tracing.begin({}) is None


async def test_a_models_name_is_bounded_where_it_names_a_span(receiver: Receiver) -> None:
    async with tracing_to(receiver) as tracing:
        end(tracing, begin(tracing), turn=make_turn(model="<b>\n\u2028é" + "x" * 252))

    (call,) = [span for span in receiver.spans if span.kind == 3]
    assert call.name == "chat _b____" + "x" * 58
    assert attributes(call)["gen_ai.request.model"] == "<b>???" + "x" * 250


async def test_a_process_says_who_it_is(receiver: Receiver) -> None:
    async with tracing_to(receiver, otel_resource_attributes="team=a%2Cb,service.name=theirs", env="development") as t:
        end(t, begin(t))
    assert (receiver.resource["service.name"], receiver.resource["team"]) == ("theirs", "a,b")
    assert receiver.resource["ibex.process"] == "worker 0"
    assert receiver.resource["deployment.environment.name"] == "development"

    async with tracing_to(receiver, otel_service_name="proxy", otel_resource_attributes="service.name=theirs") as t:
        end(t, begin(t))
    assert receiver.resource["service.name"] == "proxy"


async def test_the_endpoint_of_traces_alone_is_taken_as_it_stands(receiver: Receiver) -> None:
    endpoint = receiver.endpoint + "/otlp/in"
    async with tracing_to(
        receiver, otel_endpoint=None, otel_traces_endpoint=endpoint, otel_compression="gzip"
    ) as tracing:
        end(tracing, begin(tracing))

    assert receiver.headers["path"] == "/otlp/in"
    assert receiver.headers["content-encoding"] == "gzip"
    assert len(receiver.spans) == 6


def test_headers_that_are_none_are_refused_without_being_quoted() -> None:
    with pytest.raises(ConfigurationError) as refused:
        Tracing(Settings(otel_endpoint="http://127.0.0.1:9", otel_headers="secret"), "worker 0", Metrics())

    assert "secret" not in str(refused.value)


async def test_an_unsampled_request_costs_no_span(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    async with tracing_to(receiver, otel_sample_ratio=0.0) as tracing:
        monkeypatch.setattr("opentelemetry.sdk.trace.ReadableSpan.__init__", lambda *_, **__: pytest.fail("a span"))
        end(tracing, begin(tracing), turn=make_turn())
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "junk",
        PARENT.upper(),
        PARENT + "-x",
        "00-" + "0" * 32 + "-b7ad6b7169203331-01",
        PARENT[:36] + "0" * 16 + "-01",
        "ff" + PARENT[2:],
    ],
)
def test_what_is_no_traceparent_is_ignored(header: str) -> None:
    assert parse_traceparent(header) is None


def test_grpc_that_is_not_installed_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grpc", None)

    with pytest.raises(ConfigurationError, match="gRPC, which is not installed") as refused:
        Tracing(Settings(otel_endpoint="http://127.0.0.1:9", otel_protocol="grpc"), "worker 0", Metrics())

    assert "otlp-grpc" in str(refused.value.hint)


@pytest.mark.parametrize(
    "endpoint",
    ["collector:4317", "http://", "https://user:s3cret@collector", "http://collector/?key=s3cret", "ftp://x"],
)
def test_an_endpoint_that_is_none_is_refused_without_being_quoted(endpoint: str) -> None:
    with pytest.raises(ConfigurationError, match="OTEL_EXPORTER_OTLP_ENDPOINT: write http") as refused:
        load_settings({"IBEX_ENV_FILE": os.devnull, "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint})

    assert "s3cret" not in str(refused.value)


def test_the_variables_of_traces_alone_win_over_the_general_ones() -> None:
    settings = load_settings(
        {
            "IBEX_ENV_FILE": os.devnull,
            "OTEL_EXPORTER_OTLP_ENDPOINT": "http://all:4318",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc",
            "OTEL_EXPORTER_OTLP_HEADERS": "a=1",
            "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "a=2",
            "OTEL_EXPORTER_OTLP_TIMEOUT": "2000",
            "OTEL_SERVICE_NAME": "proxy",
        }
    )

    assert (settings.otel_protocol, settings.otel_timeout_ms, settings.otel_service_name) == ("grpc", 2000, "proxy")
    assert settings.otel_headers is not None
    assert settings.otel_headers.get_secret_value() == "a=2"
