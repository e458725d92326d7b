"""A whole benchmark: the provider alone, nginx before it, ibex before it, and the records ibex kept."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ibexctl.bench.callers import Callers, Target, register_callers
from ibexctl.bench.certificates import Certificates, own_certificates
from ibexctl.bench.growth import Growth
from ibexctl.bench.held import LONGEST_SECONDS, measure_held_streams
from ibexctl.bench.lean import running_provider
from ibexctl.bench.locust_run import require_locust
from ibexctl.bench.measuring import Measurement
from ibexctl.bench.nginx import find_nginx, serve_nginx
from ibexctl.bench.outcome import DIRECT, IBEX, NGINX, Outcome
from ibexctl.bench.plan import Plan, Scenario
from ibexctl.bench.processes import Cores, choose_cores, describe_machine, off_the_measured_cores, sum_memory
from ibexctl.bench.progress import Progress
from ibexctl.bench.records import Records, count_records
from ibexctl.bench.server_facts import describe_features, describe_server
from ibexctl.output import note
from ibexctl.trial import ending_on_sigterm, own_server

if TYPE_CHECKING:
    from ibex.config import Settings


@dataclass(kw_only=True)
class Result:
    """What a benchmark found."""

    plan: Plan
    at: datetime
    machine: dict[str, object]
    cores: Cores
    outcomes: list[Outcome]
    features: dict[str, object] = field(default_factory=dict)
    server: dict[str, Any] | None = None
    """What the server counted; None where it shows no metrics."""
    records: Records | None = None
    records_skipped: str | None = None
    """Why records were not counted."""
    starts: dict[str, float] = field(default_factory=dict)
    """Seconds that starts took, where these were measured."""

    def find(self, name: str) -> Outcome | None:
        """A contender that was run."""
        return next((found for found in self.outcomes if found.name == name and found.skipped is None), None)


def run_contest(plan: Plan) -> Result:
    """Measure ibex on a server of its own, beside the provider alone and nginx."""
    if plan.is_by_locust:
        require_locust()
    cores = choose_cores(plan.workers)
    result = Result(plan=plan, at=datetime.now(UTC), machine=describe_machine(), cores=cores, outcomes=[])
    progress = Progress()
    measurement = Measurement(plan, progress)
    with ending_on_sigterm(), off_the_measured_cores(cores), own_provider(plan) as upstream:
        if plan.is_compared:
            direct = Outcome(name=DIRECT, title="provider alone")
            result.outcomes.append(direct)
            measurement.run(direct, upstream, seconds=plan.reference_seconds)
            result.outcomes.append(_run_nginx(measurement, plan, upstream, cores))
        _run_ibex(measurement, result, upstream, progress)
    return result


def run_against(plan: Plan, url: str, *, bearer: str, agent_id: str) -> Result:
    """Measure whatever answers at an address; nothing is started, nothing pinned, no record counted."""
    if plan.is_by_locust:
        require_locust()
    cores = Cores(reason="it runs already, and only who started it may move it")
    target = Target.parse(url)
    result = Result(plan=plan, at=datetime.now(UTC), machine=describe_machine(), cores=cores, outcomes=[])
    result.records_skipped = "the stores of a server that was not started here are not looked into"
    outcome = Outcome(name=IBEX, title=target.origin)
    result.outcomes.append(outcome)
    counted = Measurement(plan, Progress()).run(
        outcome,
        target,
        seconds=plan.seconds,
        callers=Callers(agent_id, (bearer,)),
        metrics_url=f"{target.origin}/metrics",
    )
    result.server = None if counted is None else describe_server(counted)
    return result


@contextmanager
def own_provider(plan: Plan) -> Iterator[Target]:
    """The provider of the plan, until the block ends; with TLS if that is planned."""
    with ExitStack() as stack:
        certificates = stack.enter_context(own_certificates()) if plan.is_tls else None
        port = stack.enter_context(running_provider(*_provider(plan, certificates)))
        authority = "" if certificates is None else str(certificates.authority)
        yield Target("127.0.0.1", port, plan.is_tls, authority_file=authority)


def _provider(plan: Plan, certificates: Certificates | None) -> tuple[str, ...]:
    tls = () if certificates is None else ("--certificate", str(certificates.server))
    if plan.is_by_locust:
        return ("ibex.sandbox", "--gap-ms", f"{plan.gap_ms:g}", *tls)
    delay, events, gap = f"{plan.provider_ms:g}", str(plan.events), f"{plan.gap_ms:g}"
    return ("ibexctl.bench.responder", "--delay-ms", delay, "--events", events, "--gap-ms", gap, *tls)


def _run_nginx(measurement: Measurement, plan: Plan, upstream: Target, cores: Cores) -> Outcome:
    outcome = Outcome(name=NGINX, title="nginx, a plain proxy")
    program = find_nginx()
    if program is None:
        outcome.skipped = "nginx is not installed"
        return outcome
    with serve_nginx(program, upstream) as nginx:
        if nginx is None:
            outcome.skipped = "nginx did not start"
            return outcome
        cores.pin_measured([nginx.pid])
        target = Target("127.0.0.1", nginx.port)
        measurement.run(outcome, target, seconds=plan.reference_seconds, pids=[nginx.pid])
    return outcome


def _run_ibex(measurement: Measurement, result: Result, upstream: Target, progress: Progress) -> None:
    from ibex.server.supervision.status import request_status

    plan = result.plan
    outcome = Outcome(name=IBEX, title="ibex, everything on")
    result.outcomes.append(outcome)
    with own_server(has_quiet_log=False, **server_settings(plan, upstream)) as (address, settings):
        progress.begin(f"registering a directive and {plan.tokens} tokens")
        callers = register_callers(settings, plan.tokens)
        status = request_status(settings)
        workers = [process.pid for process in status.processes if process.name.startswith("worker") and process.pid]
        result.cores.pin_measured(workers)
        target = Target.parse(address)
        if plan.scenario is Scenario.STREAM and plan.open_streams:
            progress.begin(f"holding {plan.open_streams:,} streams open")
            measure_held_streams(
                outcome,
                target,
                callers,
                lambda: sum_memory(workers),
                streams=plan.open_streams,
                seconds=min(LONGEST_SECONDS, plan.seconds / 2),
            )
        growth = None
        if plan.scenario is Scenario.SOAK:
            growth = Growth(lambda: request_status(settings).processes, plan.seconds)
        counted = measurement.run(
            outcome,
            target,
            seconds=plan.seconds,
            callers=callers,
            pids=workers,
            metrics_url=status.metrics_url,
            growth=growth,
        )
        result.server = None if counted is None else describe_server(counted)
        result.features = describe_features(settings, counted, _log_bytes(settings))
        progress.begin("counting records")
        if callers.org_id is not None:
            result.records = count_records(settings, callers.org_id, outcome.answered)
        progress.begin("stopping")
    progress.end()


def server_settings(plan: Plan, upstream: Target) -> dict[str, Any]:
    """How the measured server is set up: everything on, as by default."""
    return {
        "workers": plan.workers,
        "llm_mode": "live",
        "openai_base_url": f"{upstream.origin}/v1",
        "ssl_cert_file": Path(upstream.authority_file) if upstream.authority_file else None,
        "access_log": True,
        "log_level": "info",
    }


def _log_bytes(settings: "Settings") -> int:
    path = Path(settings.data_dir) / "server.log"
    return path.stat().st_size if path.exists() else 0


def warn_of_noise(machine: dict[str, object]) -> None:
    """Say so when others use the machine: then figures are of it all."""
    load, cores = machine["load_before"], machine["cores"]
    if isinstance(load, float) and isinstance(cores, int) and load > cores / 4:
        note(f"warning: this machine is busy (load {load:g} on {cores} cores): figures are lower than it can.")
