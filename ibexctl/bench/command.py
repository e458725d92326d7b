"""`ibexctl bench`: the command, its options, its exit code."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ibex.domain.identity import DEV_AGENT_ID, DEV_TOKEN
from ibexctl.bench.plan import Scenario, make_plan
from ibexctl.command import command
from ibexctl.output import Answer

if TYPE_CHECKING:
    from ibexctl.bench.plan import Plan

_EXAMPLE = """\
ibexctl bench
ibexctl bench saturation --duration 10 --report bench.html
ibexctl bench saturation --json > before.json
ibexctl bench saturation --baseline before.json"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "bench", example=_EXAMPLE)(bench)


def bench(
    scenario: Annotated[
        Scenario,
        typer.Argument(
            help="overhead: the gate, by locust on a provider of 50 ms; saturation: an immediate provider, as many "
            "requests as go; stream: streams of 64 events; soak: half of saturation beside open streams and slow "
            "readers, for a long time; start: how soon a node serves, and its first burst."
        ),
    ] = Scenario.OVERHEAD,
    users: Annotated[
        int, typer.Option("--users", min=1, max=10_000, help="Concurrent users, a connection each.")
    ] = 100,
    duration: Annotated[
        float | None, typer.Option("--duration", min=1, help="Seconds measured.", show_default="by scenario")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, max=64, help="Workers of the server started here.")] = 1,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=1, max=100_000, help="Tokens the users present, in turn.")
    ] = None,
    tls: Annotated[
        bool, typer.Option("--tls", help="A provider that speaks TLS, under an authority made here.")
    ] = False,
    web: Annotated[
        bool, typer.Option("--web", help="overhead: locust's own page instead of a run; Ctrl-C ends it.")
    ] = False,
    against: Annotated[
        str | None, typer.Option("--against", metavar="URL", help="Measure what answers there; start nothing.")
    ] = None,
    agent: Annotated[
        str,
        typer.Option("--agent", envvar="IBEX_DEV_AGENT_ID", help="With --against: the agent.", show_default=False),
    ] = str(DEV_AGENT_ID),
    token: Annotated[
        str,
        typer.Option(
            "--token",
            envvar="IBEX_DEV_TOKEN",
            help="With --against: the bearer; better given by its variable.",
            show_default=False,
        ),
    ] = DEV_TOKEN,
    baseline: Annotated[
        Path | None,
        typer.Option("--baseline", metavar="FILE", help="An earlier run's --json: fail when over 20 % worse."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE.html", help="Write a page with plots there.")
    ] = None,
) -> Answer:
    """Measure what ibex costs, with everything on, and judge it.

    Starts a server and a provider of its own; the provider alone and, when installed, nginx as a plain proxy stand
    beside it. Fails when a target is missed or the record of an answer is.
    """
    from ibexctl.bench.verdict import read_baseline

    plan = make_plan(scenario, users=users, seconds=duration, workers=workers, tokens=tokens, is_tls=tls)
    if web:
        return _show_web(plan, against)
    if against is not None and (tls or scenario is Scenario.START):
        whose = "the server" if scenario is Scenario.START else "the provider"
        raise typer.BadParameter(f"{whose} must be one that is started here.", param_hint="'--against'")
    earlier = None if baseline is None else read_baseline(baseline)
    return _run(plan, against=against, bearer=token, agent=agent, earlier=earlier, report=report)


def _show_web(plan: "Plan", against: str | None) -> Answer:
    """Serve locust's page before a server of our own, until Ctrl-C."""
    if plan.scenario is not Scenario.OVERHEAD or against is not None:
        raise typer.BadParameter("it belongs to the scenario overhead, on a server of its own.", param_hint="'--web'")
    from ibexctl.bench.web import show_web

    url = show_web(plan)
    return Answer({"url": url}, (), [f"{url} is gone, and the server with it."])


def _run(
    plan: "Plan",
    *,
    against: str | None,
    bearer: str,
    agent: str,
    earlier: dict[str, object] | None,
    report: Path | None,
) -> Answer:
    from ibexctl.bench.contest import run_against, run_contest, warn_of_noise
    from ibexctl.bench.processes import describe_machine
    from ibexctl.bench.starting import run_start
    from ibexctl.bench.verdict import compare, judge
    from ibexctl.bench.views import result_data, result_views

    warn_of_noise(describe_machine())
    if against is not None:
        result = run_against(plan, against, bearer=bearer, agent_id=agent)
    else:
        result = run_start(plan) if plan.scenario is Scenario.START else run_contest(plan)
    data = result_data(result)
    checks = judge(result)
    if earlier is not None:
        checks += compare(earlier, data)
    is_passed = all(check.is_passed is not False for check in checks)
    data |= {"targets": [check.as_data() for check in checks], "passed": is_passed}
    notes = []
    if report is not None:
        from ibexctl.bench.report import write_report

        write_report(report, data)
        notes.append(f"The report is in {report}.")
    return Answer(data, result_views(result, checks, is_passed=is_passed), notes, exit_code=0 if is_passed else 1)
