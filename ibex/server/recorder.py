"""The recorder's process: one a node, delivering what the workers wrote into the journal."""

import argparse
import asyncio
import sys

from ibex.config import Settings, load_settings
from ibex.errors import IbexError, OperatorError, StoreError
from ibex.runtime import open_recorder
from ibex.server.control import Control
from ibex.server.lifeline import Lifeline
from ibex.server.process import begin_process, run_process
from ibex.stores.clickhouse.traces import TraceStore
from ibex.telemetry import Metrics, configure_logging, spawn

DRAIN_SECONDS = 5.0
"""How long a stopping recorder may deliver what is left; the journal keeps the rest."""
WATCH_SECONDS = 2.0


class StoreWatch:
    """Asks ClickHouse every other second whether it answers: without traffic no delivery would tell."""

    def __init__(self, traces: TraceStore) -> None:
        self._traces = traces
        self.error: str | None = None
        """Why it does not answer."""

    async def run(self) -> None:
        """Ask, for ever."""
        while True:
            try:
                async with asyncio.timeout(WATCH_SECONDS):
                    await self._traces.ping()
            except TimeoutError:
                self.error = "ClickHouse did not answer in time."
            except StoreError as error:
                self.error = error.message
            else:
                self.error = None
            await asyncio.sleep(WATCH_SECONDS)


def read_backlog(metrics: Metrics) -> dict[str, float]:
    """The journal's numbers, as the recorder last measured them."""
    return {
        "pending_turns": metrics.journal_pending_turns.labels().value,
        "oldest_seconds": metrics.journal_oldest_seconds.labels().value,
        "journal_bytes": metrics.journal_bytes.labels().value,
        "dead_letters": metrics.journal_dead_letters.labels().value,
    }


async def serve(settings: Settings, control_fd: int) -> int:
    """Record until told to end; answers the exit code."""
    metrics = Metrics()
    control = Control(metrics)
    lifeline = Lifeline(control, DRAIN_SECONDS)
    await control.connect(control_fd)
    try:
        async with open_recorder(settings, metrics=metrics) as (recorder, traces):
            clickhouse = StoreWatch(traces)
            control.read_facts = lambda: {**read_backlog(metrics), "clickhouse_error": clickhouse.error}
            control.ready()
            tasks = [
                spawn(control.report_forever(), name="metrics reports"),
                spawn(clickhouse.run(), name="store watch"),
            ]
            await recorder.run(lifeline.event)
            for task in tasks:
                task.cancel()
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
    """The process's entry: `python -m ibex.server.recorder --control FD --parent PID`."""
    parser = argparse.ArgumentParser(prog="ibex.server.recorder")
    parser.add_argument("--control", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    arguments = parser.parse_args()
    begin_process("recorder", parent=arguments.parent)
    settings = load_settings()
    configure_logging(settings, "recorder")
    return run_process(serve(settings, arguments.control))


if __name__ == "__main__":
    sys.exit(main())
