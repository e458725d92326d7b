"""Redis hung under load: its process is stopped in its tracks, and callers must neither be refused nor wait."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

from ibex.errors import OperatorError
from ibexctl.bench.callers import MODEL, Callers, register_callers
from ibexctl.demo.book import check_book
from ibexctl.demo.load import Clients, asking_clients
from ibexctl.demo.story import Finding, Promise, Story
from ibexctl.operation import operate
from ibexctl.output import Table
from ibexctl.proxy import Proxy
from ibexctl.trial import Trial, own_trial

if TYPE_CHECKING:
    from ibex.runtime import Operator
    from ibexctl.bench.load import Tally

USERS = 16
LIMIT_RPM = 20
"""The limit of an organization that asks twice as often while Redis hangs."""
REVOKED_WITHIN = 5.0
"""Contract: a revocation is in force after so many seconds whatever happens to Redis."""
ADDED_MS = 20.0
"""The deadline of a call to Redis: no caller in the middle of the field may wait for it."""
_COLUMNS = ("redis", "answers", "failed", "p50_ms", "p99_ms", "max_ms")
_QUESTION = {"model": MODEL, "messages": [{"role": "user", "content": "Reply with exactly: hello"}]}


@dataclass(frozen=True, slots=True)
class _Outage:
    """What was seen while Redis hung."""

    revoked_after: float | None
    """Seconds until a token revoked meanwhile was refused; None: it never was."""
    admitted: int
    asked: int


def demonstrate(seconds: float) -> Finding:
    """Hang the Redis of a server of its own in the middle of so long a load."""
    with own_trial(has_quiet_log=False, log_level="warning", rate_limit_on_outage="local") as trial:
        story = Story()
        callers, limited, doomed = (register_callers(trial.settings, 1) for _ in range(3))
        _limit(trial, limited)
        story.tell(f"{USERS} clients ask on and on, first with Redis at hand …")
        before, seen = _load(trial, callers, seconds / 3)
        with _clients(trial, callers, seconds) as clients:
            time.sleep(seconds / 8)
            with _hung_redis(trial) as pid:
                story.tell(f"kill -STOP {pid}: Redis takes connections and answers nothing.")
                hung_until = time.monotonic() + seconds * 0.6
                outage = _look_around(trial, limited, doomed, story)
                time.sleep(max(0.0, hung_until - time.monotonic()))
            story.tell("kill -CONT: Redis answers again.")
            tally, noted = clients.finish()
        after, rest = _load(trial, callers, seconds / 3)
        if callers.org_id is None:
            raise OperatorError("The clients have no organization.")
        turn_ids = {UUID(turn) for turn in (*seen, *noted, *rest)}
        checkpoints, traces = check_book(trial.settings, callers.org_id, turn_ids)
        story.end()
    rows = [_row("at hand", before), _row("hung", tally), _row("back", after)]
    figures = {
        "seconds_until_a_revoked_token_was_refused": outage.revoked_after,
        f"admitted_of_{outage.asked}_by_a_limit_of_{LIMIT_RPM}": outage.admitted,
        "checkpoints": checkpoints,
        "traces": traces,
    }
    added = _p50(tally) - _p50(before)
    revoked = outage.revoked_after
    promises = (
        Promise("Nobody was refused or cut off while Redis hung.", not tally.failed and tally.completed > 0),
        Promise(f"A caller waits no longer than usual: half of them less than {ADDED_MS:g} ms more.", added < ADDED_MS),
        Promise("A limit holds without Redis: nobody got more than its places.", 0 < outage.admitted <= LIMIT_RPM),
        Promise("A revoked token is refused within 5 s.", revoked is not None and revoked <= REVOKED_WITHIN),
        Promise("Every turn whose end a client saw is in both stores, once.", checkpoints.is_exact and traces.is_exact),
    )
    loads = [dict(zip(_COLUMNS, row, strict=True)) for row in rows]
    return Finding(figures, promises, (Table(_COLUMNS, rows), ""), {"loads": loads})


def _load(trial: Trial, callers: Callers, seconds: float) -> "tuple[Tally, list[str]]":
    with _clients(trial, callers, seconds) as clients:
        return clients.finish()


def _clients(trial: Trial, callers: Callers, seconds: float) -> "AbstractContextManager[Clients]":
    """Clients of whole replies: the latency of a stream is its length."""
    return asking_clients(trial.address, callers, users=USERS, seconds=seconds, stream_share=0)


@contextmanager
def _hung_redis(trial: Trial) -> Iterator[int]:
    """Redis' process stands still: its sockets stay open, and nobody answers."""
    pid = trial.pid_of("engine valkey")
    os.kill(pid, signal.SIGSTOP)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGCONT)


def _look_around(trial: Trial, limited: Callers, doomed: Callers, story: Story) -> _Outage:
    """Ask twice as often as a limit allows; then revoke a token, and ask with it until it is refused."""
    proxy = Proxy(trial.address, limited.bearers[0], limited.agent_id)
    asked = 2 * LIMIT_RPM
    statuses = [proxy.ask(_QUESTION, session_id="limited").status for _ in range(asked)]
    story.tell(f"Meanwhile one asks {asked} times with a limit of {LIMIT_RPM}: {statuses.count(200)} were admitted.")
    victim = Proxy(trial.address, doomed.bearers[0], doomed.agent_id)
    if victim.ask(_QUESTION, session_id="doomed").status != 200:
        raise OperatorError("The token that is to be revoked was refused before.")
    _revoke(trial, doomed)
    revoked_at = time.monotonic()
    while (waited := time.monotonic() - revoked_at) < 2 * REVOKED_WITHIN:
        if victim.ask(_QUESTION, session_id="doomed").status == 401:
            story.tell(f"Meanwhile a token is revoked: refused after {waited:.2f} s.")
            return _Outage(round(waited, 2), statuses.count(200), asked)
        time.sleep(0.02)
    return _Outage(None, statuses.count(200), asked)


def _limit(trial: Trial, callers: Callers) -> None:
    async def limit(operator: "Operator") -> None:
        if callers.org_id is not None:
            await operator.identity.set_limit(callers.org_id, LIMIT_RPM)

    operate(limit, settings=trial.settings)


def _revoke(trial: Trial, callers: Callers) -> None:
    async def revoke(operator: "Operator") -> None:
        await operator.identity.revoke_token(callers.bearers[0])

    operate(revoke, settings=trial.settings)


def _row(redis: str, tally: "Tally") -> tuple[object, ...]:
    latency = tally.durations().summary()
    return redis, tally.completed, tally.failed, latency["p50"], latency["p99"], latency["max"]


def _p50(tally: "Tally") -> float:
    return tally.durations().summary()["p50"]
