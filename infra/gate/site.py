"""The house that the gate asks, and what stands around it."""

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from secrets import token_hex
from urllib.parse import urlsplit

import aiohttp

from ibex.config import Secret, Settings, load_settings
from infra.gate.caller import Caller
from infra.gate.house import House, open_house, open_stand_in
from infra.gate.spans import SpanReceiver, receiving_spans
from infra.gate.wiretap import Wiretap, tapped

OPENAI_HOST = "api.openai.com"


@dataclass(frozen=True, slots=True)
class Upstream:
    """OpenAI, when this environment has a key that points there, else what stands in for it."""

    is_openai: bool
    key: Secret | None = None

    @property
    def name(self) -> str:
        """For the report."""
        if self.is_openai:
            return "OpenAI itself for the lines that need it, the ibex sandbox for all others"
        return "the ibex sandbox, a stand-in that answers by rule; no OPENAI_API_KEY points at OpenAI here"


def find_upstream() -> Upstream:
    """By the settings that a server started here would have."""
    settings = load_settings()
    is_openai = settings.openai_api_key is not None and urlsplit(settings.openai_base_url).hostname == OPENAI_HOST
    return Upstream(is_openai, settings.openai_api_key if is_openai else None)


@dataclass(frozen=True)
class Site:
    """A house whose upstream is the stand-in, the house that reaches OpenAI if one can, and the gate's instruments."""

    house: House
    live_house: House
    """The one whose upstream is OpenAI; the other one where there is no key."""
    upstream: Upstream
    stand_in: str
    """The stand-in's base URL, past the wiretap."""
    wiretap: Wiretap
    spans: SpanReceiver
    client: aiohttp.ClientSession
    fresh: aiohttp.ClientSession
    """A client that connects anew for each request, and so meets every worker."""

    @property
    def developer(self) -> Caller:
        """The development seed's caller."""
        return self.house.developer

    async def read_upstream_log(self) -> list[dict[str, object]]:
        """The stand-in's own log of the requests it was sent, oldest first."""
        origin = self.stand_in.removesuffix("/v1")
        async with self.client.get(f"{origin}/_sandbox/requests") as response:
            return list((await response.json())["requests"])


@asynccontextmanager
async def open_site(upstream: Upstream) -> AsyncIterator[Site]:
    """Open all of it, and close it in reverse."""
    key = f"sk-stand-in-{token_hex(8)}"
    async with AsyncExitStack() as stack:
        stand_in = await stack.enter_async_context(open_stand_in(key))
        wiretap = await stack.enter_async_context(tapped(stand_in))
        spans = await stack.enter_async_context(receiving_spans())
        house = await stack.enter_async_context(open_house(_settings(Secret(key), wiretap.base_url, spans.endpoint)))
        live_house = house
        if upstream.key is not None:
            base_url = f"https://{OPENAI_HOST}/v1"
            live_house = await stack.enter_async_context(open_house(_settings(upstream.key, base_url, spans.endpoint)))
        timeout = aiohttp.ClientTimeout(total=120)
        client = await stack.enter_async_context(
            aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0))
        )
        fresh = await stack.enter_async_context(
            aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0, force_close=True))
        )
        yield Site(house, live_house, upstream, stand_in, wiretap, spans, client, fresh)


def _settings(key: Secret, base_url: str, spans: str) -> Settings:
    """A house's settings: the defaults of development, whatever else is set on this machine."""
    return load_settings(
        {"IBEX_ENV_FILE": os.devnull},
        host="127.0.0.1",
        port=0,
        workers=2,
        llm_mode="live",
        openai_api_key=key,
        openai_base_url=base_url,
        rate_limit_rpm=1_000_000,
        otel_endpoint=spans,
        otel_sample_ratio=0.0,
        access_log=False,
    )
