"""A finished request as spans: one of the server's, one for each stage it reached, one of the model call."""

import socket
from urllib.parse import unquote, urlsplit
from uuid import uuid4

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from ibex import __version__
from ibex.config import Settings
from ibex.domain.turns import Outcome, Turn
from ibex.telemetry.genai import Attributes, describe_call, find_error, name_call
from ibex.telemetry.stages import Stage, StageClock
from ibex.telemetry.trace_context import SAMPLED, RequestFacts, RequestTrace, random_id

_KEPT = TraceFlags(SAMPLED)
_UNSET, _ERROR = Status(StatusCode.UNSET), Status(StatusCode.ERROR)


class SpanMaker:
    """Makes spans from the stage clock and the turn when a request is over: before that there are none."""

    def __init__(self, settings: Settings, process: str) -> None:
        self._resource = describe_process(settings, process)
        self._scope = InstrumentationScope("ibex", __version__)
        upstream = urlsplit(settings.openai_base_url)
        self._upstream: Attributes = {
            "server.address": upstream.hostname or "",
            "server.port": upstream.port or (443 if upstream.scheme == "https" else 80),
        }

    def make(self, trace: RequestTrace, clock: StageClock, request: RequestFacts) -> list[ReadableSpan]:
        """The request's own span first."""
        turn, place = trace.turn, _Place(trace)
        server = place.context(trace.span_id)
        parent = place.context(trace.parent_span_id, is_remote=True) if trace.parent_span_id else None
        attributes = _describe_request(request, turn)
        has_failed = request.status >= 500 or (turn is not None and turn.outcome is Outcome.INCOMPLETE)
        if has_failed:
            attributes["error.type"] = request.error_code or str(request.status)
        spans = [
            self._span(
                f"{request.method} {request.route}" if request.route else request.method,
                server,
                parent,
                _nanoseconds(clock, clock.started),
                int(clock.wall_now() * 1e9),
                kind=SpanKind.SERVER,
                attributes=attributes,
                status=_ERROR if has_failed else _UNSET,
            )
        ]
        for stage, begun, ended in clock.spans():
            if stage is not Stage.PROVIDER:  # that is the model call, which has a span of its own
                context = place.context(random_id(64))
                span = self._span(stage.label, context, server, _nanoseconds(clock, begun), _nanoseconds(clock, ended))
                spans.append(span)
        if turn is not None and turn.outcome is not Outcome.REPLAYED:
            spans.append(self._make_call(trace, clock, turn, place.context(trace.call_span_id), server))
        return spans

    def _make_call(
        self, trace: RequestTrace, clock: StageClock, turn: Turn, context: SpanContext, server: SpanContext
    ) -> ReadableSpan:
        """The model call, all its retries included, from the woven request to the end of the reply."""
        begun = _nanoseconds(clock, clock.ended(Stage.WEAVE) or clock.started)
        attributes = describe_call(turn, trace.reply) | self._upstream
        if turn.attempts > 1:
            attributes["http.request.resend_count"] = turn.attempts - 1
        return self._span(
            name_call(turn),
            context,
            server,
            begun,
            max(begun, turn.completed_at * 1000),
            kind=SpanKind.CLIENT,
            attributes=attributes,
            status=_UNSET if find_error(turn) is None else _ERROR,
        )

    def _span(
        self,
        name: str,
        context: SpanContext,
        parent: SpanContext | None,
        begun: int,
        ended: int,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Attributes | None = None,
        status: Status = _UNSET,
    ) -> ReadableSpan:
        # made whole, not by a tracer: the SDK's own way of starting, filling and ending a span takes ten times as long
        return ReadableSpan(
            name,
            context=context,
            parent=parent,
            resource=self._resource,
            attributes=attributes,
            kind=kind,
            status=status,
            start_time=begun,
            end_time=ended,
            instrumentation_scope=self._scope,
        )


class _Place:
    """What the contexts of all spans of a request share."""

    def __init__(self, trace: RequestTrace) -> None:
        self._trace_id = trace.trace_id
        self._state = None if trace.tracestate is None else TraceState.from_header([trace.tracestate])

    def context(self, span_id: int, *, is_remote: bool = False) -> SpanContext:
        return SpanContext(self._trace_id, span_id, is_remote, _KEPT, self._state)


def describe_process(settings: Settings, process: str) -> Resource:
    """Whose spans these are. What the operator sets stands above what is known anyway."""
    attributes: dict[str, str] = {
        "service.name": "ibex",
        "service.version": __version__,
        "service.instance.id": str(uuid4()),
        "deployment.environment.name": settings.env,
        "host.name": socket.gethostname(),
        "ibex.process": process,
    }
    for pair in settings.otel_resource_attributes:
        name, _, value = pair.partition("=")
        attributes[unquote(name.strip())] = unquote(value.strip())
    if settings.otel_service_name is not None:
        attributes["service.name"] = settings.otel_service_name
    return Resource(attributes)


def _describe_request(request: RequestFacts, turn: Turn | None) -> Attributes:
    attributes: Attributes = {
        "http.request.method": request.method,
        "http.response.status_code": request.status,
        "url.scheme": "http",
        "ibex.request_id": str(request.request_id),
    }
    if request.route is not None:
        attributes["http.route"] = request.route
    if turn is not None:
        attributes["ibex.turn_id"] = str(turn.turn_id)
        attributes["ibex.org_id"] = str(turn.org_id)
        attributes["ibex.agent_id"] = str(turn.agent_id)
        attributes["ibex.outcome"] = str(turn.outcome)
        if turn.directive_version is not None:
            attributes["ibex.directive_version"] = turn.directive_version
    return attributes


def _nanoseconds(clock: StageClock, moment: float) -> int:
    return int((clock.wall_started + moment - clock.started) * 1e9)
