"""The recorder's process: one a node, delivering what the workers wrote into the journal."""

import argparse
import sys

from ibex.config import Settings, load_settings
from ibex.errors import IbexError, OperatorError
from ibex.runtime import open_recorder
from ibex.server.control import Control
from ibex.server.lifeline import Lifeline
from ibex.server.process import begin_process, run_process
from ibex.telemetry import Metrics, configure_logging, spawn

DRAIN_SECONDS = 5.0
"""How long a stopping recorder may deliver what is left; the journal keeps the rest."""


async def serve(settings: Settings, control_fd: int | None) -> int:
    """Record until told to end; answers the exit code. Without a control socket it is a service of its own."""
    metrics = Metrics()
    control = Control(metrics)
    lifeline = Lifeline(control, DRAIN_SECONDS)
    if control_fd is not None:
        await control.connect(control_fd)
    try:
        async with open_recorder(settings, metrics=metrics) as recorder:
            control.ready()
            reports = spawn(control.report_forever(), name="metrics reports")
            await recorder.run(lifeline.event)
            reports.cancel()
    except OperatorError as error:
        control.fail(error.message, error.hint)
        return 1
    except IbexError as error:
        control.fail(error.message)
        return 1
    finally:
        await control.close()
    return 0


def main() -> int:
    """The process's entry: `python -m ibex.server.recorder [--control FD --parent PID]`."""
    parser = argparse.ArgumentParser(prog="ibex.server.recorder")
    parser.add_argument("--control", type=int)
    parser.add_argument("--parent", type=int)
    arguments = parser.parse_args()
    begin_process("recorder", parent=arguments.parent)
    settings = load_settings()
    configure_logging(settings, "recorder")
    return run_process(serve(settings, arguments.control))


if __name__ == "__main__":
    sys.exit(main())
