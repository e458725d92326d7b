"""locust's own page for the gate: a server and a provider of our own, and a load that a person starts and watches."""

import contextlib

from ibex.errors import OperatorError
from ibexctl.bench.callers import Target, register_callers
from ibexctl.bench.contest import own_provider, server_settings
from ibexctl.bench.locust_run import require_locust, running_page
from ibexctl.bench.nginx import free_port, is_listening
from ibexctl.bench.plan import Plan
from ibexctl.output import note
from ibexctl.trial import ending_on_sigterm, own_server

_START_SECONDS = 60.0


def show_web(plan: Plan) -> str:
    """Serve the page until Ctrl-C or until locust ends; its address. Raises OperatorError without locust."""
    require_locust()
    url = f"http://127.0.0.1:{free_port()}"
    with (
        ending_on_sigterm(),
        own_provider(plan) as upstream,
        own_server(has_quiet_log=False, **server_settings(plan, upstream)) as (address, settings),
    ):
        callers = register_callers(settings, plan.tokens)
        port = int(url.rpartition(":")[2])
        with running_page(plan, Target.parse(address), callers, port) as page:
            if not is_listening(page, port, within=_START_SECONDS):
                raise OperatorError("locust's page did not start.", hint="Its own words are above.")
            note(f"locust's page is at {url}, before {address}. Ctrl-C ends both.")
            with contextlib.suppress(KeyboardInterrupt):
                page.wait()
    return url
