"""What a person can see of a running process: logs, metrics, spans, and the clock of a request's stages."""

from ibex.telemetry.logs import AccessLog, configure_logging
from ibex.telemetry.loop_lag import measure_loop_lag
from ibex.telemetry.metrics import Metrics, merge_snapshots, render_metrics
from ibex.telemetry.request_scope import RequestScope
from ibex.telemetry.stages import Stage, StageClock
from ibex.telemetry.tasks import spawn
from ibex.telemetry.trace_context import RequestFacts, RequestTrace
from ibex.telemetry.tracing import Tracing

__all__ = [
    "AccessLog",
    "Metrics",
    "RequestFacts",
    "RequestScope",
    "RequestTrace",
    "Stage",
    "StageClock",
    "Tracing",
    "configure_logging",
    "measure_loop_lag",
    "merge_snapshots",
    "render_metrics",
    "spawn",
]
