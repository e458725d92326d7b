"""A stream cut at byte N, for every N: whole events, then an error; never one that looks whole and is not."""

import asyncio
import contextlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from ibexctl.bench.callers import register_callers
from ibexctl.demo.sight import Sight, ask, judge
from ibexctl.demo.story import Finding, Promise, Story
from ibexctl.operation import operate
from ibexctl.output import printable
from ibexctl.proxy import Proxy
from ibexctl.trial import own_trial

if TYPE_CHECKING:
    from ibex.config import Settings
    from ibex.domain.identity import OrgId
    from ibex.runtime import Operator

_CLIENTS = 8
_SETTLE_SECONDS = 15.0
_SHOWN_EVENTS = 2
_WIDTH = 110


def demonstrate(at: int | None, step: int) -> Finding:
    """Cut a stream at every `step`-th byte, and show what a client sees of the cut at byte `at`."""
    with own_trial(has_quiet_log=False, log_level="warning") as trial:
        story = Story()
        callers = register_callers(trial.settings, 1)
        ibex = partial(ask, trial.address, Proxy(trial.address, callers.bearers[0], callers.agent_id).headers())
        provider = partial(ask, trial.upstream(), {"Content-Type": "application/json"})
        whole = ibex(None)
        size = len(whole.body)
        shown_at = size * 2 // 3 if at is None else min(at, size - 1)
        story.tell(f"A whole stream has {size:,} bytes in {len(whole.events)} events.")
        direct, through = provider(shown_at), ibex(shown_at)
        places = [*range(0, size, step), size]
        story.tell(f"The provider breaks off {len(places):,} more of them, at each of these bytes …")
        with ThreadPoolExecutor(_CLIENTS) as clients:
            sights = list(clients.map(ibex, places))
        verdicts = Counter(judge(sight, whole, place) for sight, place in zip(sights, places, strict=True))
        recorded = _count_outcomes(trial.settings, callers.org_id, 2 + sum(sight.status == 200 for sight in sights))
        story.end()
    wrong = {verdict: count for verdict, count in verdicts.items() if verdict not in {"whole", "honest"}}
    figures = {
        "cut_at_bytes": f"0 to {size:,}" + (f", every {step}th" if step > 1 else ", every one"),
        "whole_events_then_an_error": verdicts["honest"],
        "whole": verdicts["whole"],
        "otherwise": wrong or "none",
        "recorded_as": recorded,
    }
    is_recorded = recorded.get("ok", 0) == 1 + verdicts["whole"] and recorded.get("incomplete", 0) == (
        1 + sum(sight.status == 200 for sight in sights) - verdicts["whole"]
    )
    promises = (
        Promise("A client gets every whole event, then an error, and never an end that looks whole.", not wrong),
        Promise("The record says of each whether it was whole.", is_recorded),
    )
    endings = {"direct": _ending(direct), "through_ibex": _ending(through)}
    exhibit = (
        f"The stream cut at byte {shown_at:,}, as its client sees it without ibex:",
        *(*endings["direct"], "", "The same through ibex:"),
        *(*endings["through_ibex"], ""),
    )
    return Finding(figures, promises, exhibit, {"shown": {"at_byte": shown_at, **endings}})


def _count_outcomes(settings: "Settings", org_id: "OrgId | None", expected: int) -> dict[str, int]:
    """How the record says the streams ended, once it has as many as were begun or gets no more."""

    async def count(operator: "Operator") -> dict[str, int]:
        if org_id is None:
            return {}
        found = Counter[str]()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SETTLE_SECONDS):
                while found.total() < expected:
                    await asyncio.sleep(0.25)
                    traces = await operator.traces.list(org_ids=[org_id], limit=None)
                    found = Counter(trace["outcome"] for trace in traces)
        return dict(found)

    return operate(count, settings=settings, clickhouse=True)


def _ending(sight: Sight) -> list[str]:
    """The last a client sees of a stream."""
    events = sight.events
    more = len(events) - _SHOWN_EVENTS
    lines = [f"  … {more} whole events"] if more > 0 else []
    for event in events[-_SHOWN_EVENTS:]:
        lines.append(f"  {_shorten(printable(event.decode(errors='replace').strip()))}")
        if not event.endswith(b"\n\n"):
            lines.append("  ▲ torn")
    return [*lines, "  end of the body" if sight.ended_cleanly else "  connection closed: the body has no end"]


def _shorten(event: str) -> str:
    """As much of an event as fits on a line: what it says stands at its end, what an error says at its beginning."""
    if len(event) <= _WIDTH:
        return event
    if event.startswith('data: {"error"'):
        return event.partition(',"param"')[0] + ", …"
    return f"{event[:20]} … {event[23 - _WIDTH :]}"
