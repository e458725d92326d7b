"""`kill -9` in mid-load: a worker, the recorder, then everything at once; afterwards both stores are counted."""

import os
import signal
import time
from datetime import timedelta
from uuid import UUID

from ibex.errors import OperatorError
from ibexctl.bench.callers import register_callers
from ibexctl.demo.book import check_book
from ibexctl.demo.load import asking_clients
from ibexctl.demo.story import Finding, Promise, Story
from ibexctl.reconcile import compare_stores
from ibexctl.trial import own_trial

USERS = 32
WORKERS = 2


def demonstrate(seconds: float) -> Finding:
    """Kill a server of its own for so long a load."""
    with own_trial(workers=WORKERS, has_quiet_log=False, log_level="warning") as trial:
        story = Story()
        callers = register_callers(trial.settings, WORKERS)
        story.tell(f"{USERS} clients ask on and on, two in five times for a stream, and note every turn they saw end.")
        with asking_clients(trial.address, callers, users=USERS, seconds=seconds, stream_share=0.4) as clients:
            for victim in ("worker 0", "recorder"):
                time.sleep(seconds / 8)
                pid = trial.pid_of(victim)
                os.kill(pid, signal.SIGKILL)
                story.tell(f"kill -9 {pid}: {victim}")
            time.sleep(seconds / 4)
            count = trial.kill_everything()
            story.tell(f"kill -9 of all {count} processes at once: supervisor, workers, recorder, and the three stores")
            killed_at = time.monotonic()
            trial.start()
            away = time.monotonic() - killed_at
            story.tell(f"started again on the same data; it serves after {away:.1f} s.")
            tally, seen = clients.finish()
        story.tell("The clients have stopped. Their book against both stores, then `ibexctl reconcile` …")
        if callers.org_id is None:
            raise OperatorError("The clients have no organization.")
        checkpoints, traces = check_book(trial.settings, callers.org_id, {UUID(turn) for turn in seen})
        nothing_under_way = timedelta(seconds=-1)
        compared = compare_stores(trial.settings, since=timedelta(hours=1), settle=nothing_under_way)
        story.end()
    figures = {
        "turns_seen_whole": len(seen),
        "requests_without_an_answer": tally.failed,
        "seconds_until_it_served_again": round(away, 1),
        "checkpoints": checkpoints,
        "traces": traces,
        "recorded_and_unseen": checkpoints.unseen,
        "reconcile": f"{compared.checkpoints:,} checkpoints, {compared.traces:,} traces,"
        f" {len(compared.differences)} differences",
    }
    promises = (
        Promise("Every turn whose end a client saw is in Postgres, once.", checkpoints.is_exact and bool(seen)),
        Promise("Every turn whose end a client saw is in ClickHouse, once.", traces.is_exact and bool(seen)),
        Promise("Both stores agree, to the turn and to the token.", not compared.differences),
    )
    return Finding(figures, promises)
