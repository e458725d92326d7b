"""A recorder in a process of its own that can be told to die at the worst moment.

Arguments: journal, Postgres' DSN, ClickHouse's DSN, and perhaps a sink. With a sink it dies by SIGKILL when that sink
has taken a batch and before the recorder has noted it.
"""

import asyncio
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

from ibex.config import load_settings
from ibex.recorder import Recorder
from ibex.recorder.ledger import Ledger
from ibex.stores.clickhouse.traces import TraceStore
from ibex.stores.postgres.changes import prune_changes
from ibex.stores.postgres.pool import Postgres
from ibex.stores.postgres.sessions import SessionStore
from ibex.telemetry import Metrics


async def main(directory: str, postgres_dsn: str, clickhouse_dsn: str, deadly_sink: str | None = None) -> None:
    finish = Ledger.finish

    def finish_or_die(self: Ledger, sink: str, *rest: Any) -> None:
        if sink == deadly_sink:
            os.kill(os.getpid(), signal.SIGKILL)
        finish(self, sink, *rest)

    Ledger.finish = finish_or_die  # type: ignore[method-assign]
    postgres = await Postgres.connect(postgres_dsn, name="recorder")
    recorder = Recorder(
        load_settings({"IBEX_ENV_FILE": os.devnull}),
        journal_dir=Path(directory),
        sessions=SessionStore(postgres),
        traces=await TraceStore.connect(clickhouse_dsn),
        metrics=Metrics(),
        prune=partial(prune_changes, postgres),
    )
    await recorder.run(asyncio.Event())


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
