"""Who is let in: the security matrix, and how soon a revocation holds."""

import asyncio
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

from ibex.domain.identity import DEV_ORG_ID
from infra.gate.caller import Caller, ask
from infra.gate.programs import ROOT, run_program
from infra.gate.proof import Proof, judge
from infra.gate.site import Site

REVOKED_SECONDS = 5.0
_BAD = ("failures", "errors", "skipped")
_WATCH_SECONDS = 8.0
"""How long a token is watched after its revocation, at most."""
_PACE_SECONDS = 0.01
_QUIET_SECONDS = 1.0
"""Only refusals for so long, from every worker: the token is dead."""


async def matrix() -> Proof:
    """The whole of tests/security; one of its tests holds that every row of the matrix has a test."""
    with TemporaryDirectory(prefix="ibex-gate-") as directory:
        report = f"{directory}/report.xml"
        done = await run_program(sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", "tests/security")
        suites = ElementTree.parse(report).getroot()  # noqa: S314 - our own pytest wrote it
    counts = {name: sum(int(suite.get(name, "0")) for suite in suites) for name in ("tests", *_BAD)}
    bad = sum(counts[name] for name in _BAD)
    table = (ROOT / "tests/security/test_rows.py").read_text().partition("\n}\n")[0]
    rows = re.findall(r'^    "\d\.\d": ', table, flags=re.MULTILINE)
    how = f"`make test-security`, which holds that each of the matrix's {len(rows)} rows has a test"
    figure = f"{counts['tests'] - bad} of {counts['tests']} tests passed, {counts['skipped']} skipped"
    failed = [str(case.get("name")) for case in suites.iter("testcase") if len(case)]
    figure += f"; {', '.join(failed[:3])}" if failed else ""
    return judge(done.code == 0 and counts["tests"] > 0 and bad == 0, how, figure)


async def revocation(site: Site) -> Proof:
    """From the moment the revocation was written to the last request that a worker still let pass."""
    heard = [await _revoke_one(site) for _ in range(4)]
    async with _redis_hung(site):
        alone = [await _revoke_one(site) for _ in range(2)]
    how = "`ibexctl token revoke` while four callers ask both workers; then with Redis stopped by SIGSTOP"
    figure = f"{max(heard):.2f} s at worst of {len(heard)}; without Redis {max(alone):.2f} s of {len(alone)}"
    return judge(max(heard + alone) <= REVOKED_SECONDS, how, f"{figure} (bar {REVOKED_SECONDS:.0f} s)")


async def _revoke_one(site: Site) -> float:
    """Seconds for which a revoked token was still good; more than any bar when it never was refused."""
    minted = await site.house.ctl("token", "mint", "--org", str(DEV_ORG_ID), "--name", "gate")
    caller = Caller(site.house.url, minted["token"], site.developer.agent_id)
    warm = await asyncio.gather(*(ask(site.fresh, caller, path="/v1/internal/auth-probe") for _ in range(20)))
    if any(answer.status != 200 for answer in warm):
        return float("inf")
    last_good, watched_until = 0.0, float("inf")

    async def watch() -> None:
        nonlocal last_good
        while time.time() < min(watched_until, max(last_good, told_at) + _QUIET_SECONDS):
            answer = await ask(site.fresh, caller, path="/v1/internal/auth-probe")
            if answer.status == 200:
                last_good = max(last_good, answer.sent_at)
            await asyncio.sleep(_PACE_SECONDS)

    told_at = float("inf")
    async with asyncio.TaskGroup() as watching:
        for _ in range(4):
            watching.create_task(watch())
        revoked = await site.house.ctl("token", "revoke", minted["token_id"])
        told_at = time.time()
        watched_until = told_at + _WATCH_SECONDS
    return max(0.0, last_good - datetime.fromisoformat(revoked["revoked_at"]).timestamp())


@asynccontextmanager
async def _redis_hung(site: Site) -> AsyncIterator[None]:
    pid = await site.house.find_pid("engine valkey")
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
