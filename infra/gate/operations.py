"""What an operator leans on: the smoke test, a shutdown that drops nothing, metrics, spans."""

import asyncio
import re
import sys
from pathlib import Path
from secrets import token_bytes, token_hex
from typing import Any

import aiohttp
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from ibex.telemetry import Metrics
from infra.gate.caller import MODEL, ask, question
from infra.gate.programs import ROOT, run_program
from infra.gate.proof import Proof, Status, judge
from infra.gate.site import Site

_SPAN_SECONDS = 20.0
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-")


async def e2e_smoke(site: Site) -> Proof:
    """The end-to-end script with a key set; with a stand-in's key it shows that it works, and signs nothing off."""
    house, key = site.live_house, site.live_house.settings.openai_api_key
    environ = house.environ | {
        "OPENAI_API_KEY": key.get_secret_value() if key is not None else "",
        "IBEX_PROXY_ADDR": house.url,
        "IBEXCTL": str(Path(sys.executable).with_name("ibexctl")),
    }
    done = await run_program(ROOT / "infra/scripts/e2e_smoke_p2.sh", environ=environ)
    how = "`make e2e-smoke`'s script against the running house, with a key set"
    if done.code != 0:
        return Proof(Status.FAIL, how, f"exit {done.code}: {done.last_words}")
    passed = done.out.count("PASS: ")
    if site.upstream.is_openai and "PASS: real OpenAI completion" in done.out:
        return Proof(Status.PASS, how, f"exit 0, {passed} checks, answered by OpenAI")
    return Proof(Status.PENDING, how, f"exit 0, {passed} checks, answered by the ibex sandbox in OpenAI's place")


async def metrics(site: Site) -> Proof:
    """Every metric of the catalogue in a scrape, each sample with the labels it is declared with and no id in them."""
    async with site.client.get(site.house.facts["metrics_url"]) as response:
        families = {family.name: family for family in text_string_to_metric_families(await response.text())}
    catalogue = {metric.name.removesuffix("_total"): metric.label_names for metric in Metrics()}
    faults = [f"{name} {fault}" for name, labels in catalogue.items() if (fault := _fault(families.get(name), labels))]
    shown = [families[name].samples for name in catalogue if name in families]
    how = "`/metrics` of the house against the catalogue in the code"
    figure = (
        f"{len(shown)} of {len(catalogue)} metrics, {sum(map(len, shown))} samples,"
        f" {shown.count([])} whose labels did not occur yet"
    )
    return judge(not faults, how, "; ".join(faults) or figure)


def _fault(family: Metric | None, label_names: tuple[str, ...]) -> str:
    """What is wrong with a metric as it was scraped; nothing when nothing is."""
    if family is None:
        return "is missing"
    if not family.samples and not label_names:
        return "has no value"
    if any(set(sample.labels) - {"le"} != set(label_names) for sample in family.samples):
        return "has other labels than it declares"
    values = [value for sample in family.samples for value in sample.labels.values()]
    return "has an id in a label" if any(map(_UUID.search, values)) else ""


async def spans(site: Site) -> Proof:
    """One request's spans at an OTLP receiver: the server's under its caller's, the stages and the call under it."""
    found = await _trace_one(site)
    how = "a request with a sampled `traceparent`; OTLP over HTTP, read back by a receiver of the gate's own"
    servers = [span for span in found if span.kind == Span.SPAN_KIND_SERVER]
    calls = [span for span in found if span.kind == Span.SPAN_KIND_CLIENT]
    if len(servers) != 1 or not calls:
        return Proof(Status.FAIL, how, f"{len(found)} spans: {len(servers)} of the server, {len(calls)} of the call")
    beneath = [span for span in found if span.parent_span_id == servers[0].span_id]
    is_whole = len(beneath) == len(found) - 1 and any(span.name == f"chat {MODEL}" for span in calls)
    names = ", ".join(span.name for span in beneath)
    return judge(is_whole, how, f"{len(found)} spans: {servers[0].name}, and beneath it {names}")


async def _trace_one(site: Site) -> list[Span]:
    """The spans of one request, once its caller's span has a child and nothing more comes."""
    trace_id, parent = token_bytes(16), token_hex(8)
    await ask(
        site.client, site.developer, question("spans"), headers={"traceparent": f"00-{trace_id.hex()}-{parent}-01"}
    )
    found: list[Span] = []
    async with asyncio.timeout(_SPAN_SECONDS):
        while not any(span.parent_span_id.hex() == parent for span in found):
            await asyncio.sleep(0.1)
            found = site.spans.of_trace(trace_id)
    return found


async def shutdown(site: Site) -> Proof:
    """SIGTERM under open streams and waiting requests. The house is gone afterwards: this is its last line."""
    streams, waiting, events = 100, 20, 30
    stream = question("drain", is_streaming=True, events=events, gap_ms=100, text="drained ")
    slow = question("drain", delay_ms=2500, text="drained")

    async def is_served(body: dict[str, Any]) -> bool:
        try:
            answer = await ask(site.client, site.developer, body)
        except aiohttp.ClientError:
            return False
        return answer.is_whole and answer.text.split() == ["drained"] * (events if body["stream"] else 1)

    async with asyncio.TaskGroup() as asking:
        asked = [asking.create_task(is_served(body)) for body in [stream] * streams + [slow] * waiting]
        await asyncio.sleep(1.0)  # the streams are in their middle, the others wait for their heads
        code = await site.house.stop()
    whole = sum(task.result() for task in asked)
    status: Any = await site.house.ctl("journal", "status")
    left = sum(store["pending_turns"] for store in status["stores"])
    how = f"SIGTERM with {streams} open streams and {waiting} requests that wait"
    figure = f"{whole} of {len(asked)} whole, exit {code}, {left} turns left in the journal"
    return judge(whole == len(asked) and code == 0 and left == 0, how, figure)
