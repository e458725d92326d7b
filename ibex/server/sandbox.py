"""The sandbox's process: development's stand-in for a provider, kept by the supervisor on one port."""

import argparse
import sys

from ibex.config import Settings, load_settings
from ibex.sandbox import Sandbox
from ibex.server.control import Control
from ibex.server.lifeline import Lifeline
from ibex.server.process import begin_process, run_process
from ibex.telemetry import Metrics, configure_logging, spawn


async def serve(settings: Settings, port: int, control_fd: int) -> int:
    """Serve until told to end; answers the exit code."""
    control = Control(Metrics())
    lifeline = Lifeline(control, settings.shutdown_timeout)
    await control.connect(control_fd)
    try:
        async with Sandbox.serve(port=port, gap_ms=settings.sandbox_gap_ms) as sandbox:
            control.ready(base_url=sandbox.base_url)
            reports = spawn(control.report_forever(), name="metrics reports")
            await lifeline.ended()
            reports.cancel()
    except OSError as error:
        control.fail(f"cannot listen on port {port}: {error.strerror}")
        return 1
    finally:
        await control.close()
    return 0


def main() -> int:
    """The process's entry: `python -m ibex.server.sandbox --port N --control FD --parent PID`."""
    parser = argparse.ArgumentParser(prog="ibex.server.sandbox")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--control", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    arguments = parser.parse_args()
    begin_process("sandbox", parent=arguments.parent)
    settings = load_settings()
    configure_logging(settings, "sandbox")
    return run_process(serve(settings, arguments.port, arguments.control))


if __name__ == "__main__":
    sys.exit(main())
