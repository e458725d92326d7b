"""What the proxy is for: completions, streams as they are made, directives, and a record of every turn."""

import asyncio
import time
from itertools import pairwise
from secrets import token_hex
from typing import Any

import msgspec

from ibex.domain.identity import DEV_AGENT_ID
from ibex.runtime import open_operator
from infra.gate.caller import Answer, ask, question
from infra.gate.programs import ProgramFailed
from infra.gate.proof import Proof, Status, judge
from infra.gate.site import Site
from infra.gate.wiretap import event_times

FIRST_BYTE_MS = 100.0
VISIBLE_MS = 500.0
AGENT = str(DEV_AGENT_ID)
_IN_FORCE_SECONDS = 5.0
_RECORD_SECONDS = 15.0


async def completion(site: Site) -> Proof:
    """A completion of OpenAI's. One of a stand-in shows the way there, and signs nothing off."""
    smoke = await site.live_house.ctl("smoke", "--addr", site.live_house.url)
    checks = smoke["checks"]
    faults = [f"{check['name']}: {check['detail']}" for check in checks if check["result"] != "passed"]
    how = "`ibexctl smoke`: a completion, whole and streamed, and its record"
    if faults:
        return Proof(Status.FAIL, how, "; ".join(faults))
    if site.upstream.is_openai and smoke["upstream"] == "openai":
        return Proof(Status.PASS, how, f"{len(checks)} of {len(checks)} checks, answered by OpenAI")
    figure = f"{len(checks)} of {len(checks)} checks, answered by the ibex sandbox in OpenAI's place"
    return Proof(Status.PENDING, how, figure)


async def live_stream(site: Site) -> Proof:
    """Each event leaves when it has come: compared at a wiretap before the provider, by one clock."""
    streams, events = 20, 10
    firsts: list[float] = []
    lags: list[float] = []
    for _ in range(streams):
        site.wiretap.clear()
        answer = await ask(
            site.client, site.developer, question("live", is_streaming=True, events=events, gap_ms=20, delay_ms=20)
        )
        came = event_times(list(answer.pieces))
        if not answer.is_whole or len(came) < events:
            return Proof(Status.FAIL, "streams through a wiretap", f"a stream was not whole: {answer.status}")
        lag = [(here - there) * 1e3 for there, here in zip(event_times(site.wiretap.seen), came, strict=False)]
        firsts.append(lag[0])
        lags += lag
    how = f"{streams} streams of events 20 ms apart; arrival at a wiretap before the provider against the client's"
    figure = f"first byte {max(firsts):.1f} ms after the provider's at worst; any of {len(lags)} events {max(lags):.1f}"
    return judge(max(firsts) <= FIRST_BYTE_MS, how, f"{figure} ms (bar {FIRST_BYTE_MS:.0f})")


async def directive(site: Site) -> Proof:
    """In every request, in each mode, as the upstream itself noted it down."""
    modes, each = ("system_first", "system_append", "user_prepend"), 20
    woven = sent = 0
    for mode in modes:
        text = f"Gate {token_hex(8)}: answer in one word."
        await site.house.ctl("directive", "set", AGENT, "--mode", mode, "--text", text)
        await _await_in_force(site, text)
        mark = token_hex(8)
        await asyncio.gather(
            *(ask(site.client, site.developer, question(f"{mark} {k}", is_streaming=k % 2 == 0)) for k in range(each))
        )
        bodies = [str(entry["body"]) for entry in await site.read_upstream_log()]
        asked = [msgspec.json.decode(body)["messages"] for body in bodies if mark in body]
        sent += each
        woven += sum(len(asked) == each and _is_woven(messages, mode, text) for messages in asked)
    how = f"the upstream's own log of {sent} requests, JSON and streamed, in {len(modes)} modes"
    return judge(woven == sent, how, f"{woven} of {sent} with the directive in its place")


async def _await_in_force(site: Site, text: str) -> None:
    """Until both workers weave a new directive; the line is about requests after that."""
    deadline = time.monotonic() + _IN_FORCE_SECONDS
    streak = 0
    while streak < 10 and time.monotonic() < deadline:
        mark = token_hex(8)
        await ask(site.fresh, site.developer, question(mark))
        bodies = [str(entry["body"]) for entry in await site.read_upstream_log()]
        streak = streak + 1 if any(mark in body and text in body for body in bodies) else 0


def _is_woven(messages: list[dict[str, Any]], mode: str, text: str) -> bool:
    first = messages[0]
    if mode == "user_prepend":
        return first["role"] == "user" and str(first["content"]).startswith(f"[DIRECTIVE]: {text}\n\n")
    return first == {"role": "system", "content": text} and messages[1]["role"] == "user"


async def record(site: Site) -> Proof:
    """A session with its checkpoints in order, and a trace, for every turn that a client saw the end of."""
    sessions, each = 3, 20
    names = [f"gate-{token_hex(6)}" for _ in range(sessions)]
    seen = dict(zip(names, await asyncio.gather(*(_converse(site, name, each) for name in names)), strict=True))
    deadline = time.monotonic() + _RECORD_SECONDS
    faults = dict.fromkeys(names, "")
    while time.monotonic() < deadline:
        await asyncio.sleep(0.5)
        faults = {name: fault for name in faults if (fault := await _find_fault(site, name, seen[name]))}
        if not faults:
            break
    turns = sum(map(len, seen.values()))
    how = f"{turns} turns in {sessions} sessions, by `ibexctl session show` and `ibexctl trace list`"
    figure = f"{turns} checkpoints and {turns} traces, indexes 0 to {each - 1} without a gap"
    return judge(not faults, how, "; ".join(dict.fromkeys(faults.values())) or figure)


async def _converse(site: Site, session: str, turns: int) -> list[str]:
    """One session, a turn after the other; the turns' ids."""
    named = {"X-IBEX-Session-ID": session}
    asked: list[Answer] = []
    for number in range(turns):
        body = question("record", is_streaming=number % 2 == 1)
        asked.append(await ask(site.client, site.developer, body, headers=named))
    return [answer.turn_id for answer in asked if answer.is_whole]


async def _find_fault(site: Site, session: str, turn_ids: list[str]) -> str:
    try:
        shown = await site.house.ctl("session", "show", session, "--agent", AGENT)
        listed = await site.house.ctl("trace", "list", "--session", session, "--agent", AGENT, "--limit", "1000")
    except ProgramFailed as error:  # the session is not there yet
        return str(error)
    checkpoints, traces = shown["checkpoints"], {trace["turn_id"] for trace in listed["traces"]}
    if [row["turn_id"] for row in checkpoints] != turn_ids or not all(row["is_complete"] for row in checkpoints):
        return f"{len(checkpoints)} checkpoints of {len(turn_ids)} turns"
    if any(after["turn_index"] - before["turn_index"] != 1 for before, after in pairwise(checkpoints)):
        return "a gap in a session's indexes"
    return "" if traces == set(turn_ids) else f"{len(traces)} traces of {len(turn_ids)} turns"


async def visibility(site: Site) -> Proof:
    """From a response's last byte to the trace in a query's answer, asked again every few milliseconds."""
    turns, gap_seconds = 100, 0.03
    session = f"gate-{token_hex(6)}"
    ended: dict[str, float] = {}
    visible: dict[str, float] = {}

    async def call() -> None:
        for _ in range(turns):
            answer = await ask(site.client, site.developer, question("visible"), headers={"X-IBEX-Session-ID": session})
            ended[answer.turn_id] = answer.ended_at
            await asyncio.sleep(gap_seconds)

    async def watch() -> None:
        async with open_operator(site.house.settings, clickhouse=True) as operator:
            org_ids = await operator.all_org_ids()
            while len(visible) < turns:
                found = await operator.traces.list(org_ids=org_ids, session=session, limit=turns)
                now = time.perf_counter()
                visible.update({str(row["turn_id"]): now for row in found if str(row["turn_id"]) not in visible})
                await asyncio.sleep(0.02)

    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        tasks.create_task(watch())
        tasks.create_task(call())
    lags = sorted((visible[turn] - ended[turn]) * 1e3 for turn in ended)
    p99 = lags[int(len(lags) * 0.99) - 1]
    how = f"{turns} turns, some 30 a second, while the trace store was asked for the latest every 20 ms"
    figure = f"p99 {p99:.0f} ms, worst {lags[-1]:.0f} ms, median {lags[len(lags) // 2]:.0f} ms (bar {VISIBLE_MS:.0f})"
    return judge(p99 <= VISIBLE_MS, how, figure)
