"""Egress through a proxy: who is reached through it, and that the tunnel's far end is still verified."""

import base64
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import pytest

from ibex.providers.proxies import Proxy, is_exempt, parse_proxy
from ibex.providers.transport import CertificateRefused, ConnectFailed, ConnectTimedOut
from tests.providers.egress import OPENED, EgressProxy, egress_proxy
from tests.providers.upstream import LONG, answer_all, ask, open_transport, serve_script, until

NAME = "upstream.test"


def named(base_url: str) -> str:
    """The upstream under a name that only the proxy can resolve."""
    return f"https://{NAME}:{urlsplit(base_url).port}/v1"


def as_proxy(proxy: EgressProxy, credentials: str | None = None) -> Proxy:
    return Proxy("127.0.0.1", proxy.port, credentials)


async def test_an_https_upstream_is_reached_through_the_proxy_and_verified_behind_it(certificates: Any) -> None:
    async with (
        serve_script(answer_all, ssl_context=certificates.serving(NAME)) as upstream,
        egress_proxy(upstream.base_url) as proxy,
        open_transport(
            named(upstream.base_url), ssl_context=certificates.trusting(), proxy=as_proxy(proxy, "me:s3cret")
        ) as transport,
    ):
        for _ in range(3):
            assert await ask(transport, b"x" * 300_000) == b"hi"
        port = urlsplit(upstream.base_url).port
        credentials = base64.b64encode(b"me:s3cret").decode()
        assert proxy.asked == [
            f"CONNECT {NAME}:{port} HTTP/1.1\r\nHost: {NAME}:{port}\r\n"
            f"Proxy-Authorization: Basic {credentials}\r\n\r\n".encode()
        ]
        assert all(b"Proxy-" not in request for request in upstream.requests)
        assert transport.idle_connections == 1
    await until(lambda: transport.open_connections == 0)


async def test_a_proxy_cannot_pass_itself_off_as_the_upstream(certificates: Any) -> None:
    async with (
        serve_script(answer_all, ssl_context=certificates.serving("other.test")) as upstream,
        egress_proxy(upstream.base_url) as proxy,
        open_transport(
            named(upstream.base_url), ssl_context=certificates.trusting(), proxy=as_proxy(proxy)
        ) as transport,
    ):
        with pytest.raises(CertificateRefused, match="certificate"):
            await ask(transport)
        assert upstream.requests == []


async def test_an_http_upstream_is_reached_directly() -> None:
    async with (
        serve_script(answer_all) as upstream,
        egress_proxy(upstream.base_url) as proxy,
        open_transport(upstream.base_url, proxy=as_proxy(proxy)) as transport,
    ):
        assert await ask(transport) == b"hi"
        assert proxy.asked == []


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "credentials"),
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno", "no tunnel"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", "no tunnel"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "no tunnel"),
        (OPENED.replace(b"200", b"20x"), "no tunnel"),
        (b"HTTP/1.1 200 OK\r\n\r\nsurprise", "no tunnel"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 20_000, "no tunnel"),
    ],
)
async def test_a_proxy_that_opens_no_tunnel_is_a_failure_to_connect(
    certificates: Any, answer: bytes, message: str
) -> None:
    async with (
        egress_proxy("http://127.0.0.1:1", answer=answer) as proxy,
        open_transport(
            "https://upstream.test", ssl_context=certificates.trusting(), proxy=as_proxy(proxy, "me:s3cret")
        ) as transport,
    ):
        with pytest.raises(ConnectFailed, match=message) as caught:
            await ask(transport)
        assert "s3cret" not in caught.value.message
        assert transport.open_connections == 0


async def test_a_proxy_that_does_not_answer_is_given_up(certificates: Any) -> None:
    deadlines = replace(LONG, connect=0.1)
    async with (
        egress_proxy("http://127.0.0.1:1", answer=b"HTTP/1.1 200 O") as proxy,
        open_transport(
            "https://upstream.test", deadlines=deadlines, ssl_context=certificates.trusting(), proxy=as_proxy(proxy)
        ) as transport,
    ):
        with pytest.raises(ConnectTimedOut):
            await ask(transport)


async def test_a_proxy_that_is_away_is_a_failure_to_connect(certificates: Any) -> None:
    proxy = Proxy("127.0.0.1", 1)
    async with open_transport("https://upstream.test", ssl_context=certificates.trusting(), proxy=proxy) as transport:
        with pytest.raises(ConnectFailed):
            await ask(transport)


@pytest.mark.parametrize(
    ("no_proxy", "host", "is_direct"),
    [
        ("", "api.openai.com", False),
        ("*", "api.openai.com", True),
        ("openai.com", "api.openai.com", True),
        (".openai.com", "api.openai.com", True),
        ("*.openai.com", "api.openai.com", True),
        ("API.OpenAI.com", "api.openai.com", True),
        ("openai.com", "notopenai.com", False),
        ("openai.com", "openai.com.evil.test", False),
        ("api.openai.com:443", "api.openai.com", True),
        ("api.openai.com:8443", "api.openai.com", False),
        ("other.test, openai.com", "api.openai.com", True),
        ("10.0.0.0/8", "10.1.2.3", True),
        ("10.0.0.0/8", "11.1.2.3", False),
        ("10.1.2.3", "10.1.2.3", True),
        ("10.1.2.3:443", "10.1.2.3", True),
        ("::1", "::1", True),
        ("[::1]:443", "::1", True),
        ("[::1]:80", "::1", False),
        ("fd00::/8", "fd12::1", True),
        ("10.0.0.0/8", "::1", False),
        (".", "api.openai.com", False),
    ],
)
def test_exemptions_are_read_as_other_programs_read_them(no_proxy: str, host: str, is_direct: bool) -> None:
    assert is_exempt(host, 443, no_proxy.split(",")) is is_direct


@pytest.mark.parametrize(
    ("url", "proxy"),
    [
        ("http://proxy.test:3128", Proxy("proxy.test", 3128)),
        ("http://proxy.test/", Proxy("proxy.test", 80)),
        ("proxy.test:3128", Proxy("proxy.test", 3128)),
        ("http://me:p%40ss@[::1]:3128", Proxy("::1", 3128, "me:p@ss")),
    ],
)
def test_a_proxys_address_is_read(url: str, proxy: Proxy) -> None:
    assert parse_proxy(url) == proxy
    assert "p@ss" not in repr(parse_proxy(url))


@pytest.mark.parametrize(
    "url",
    [
        "https://me:hush@proxy.test",
        "socks5://me:hush@h",
        "http://",
        "http://me:hu/sh@h",
        "http://h:hush",
        "http://[hush",
    ],
)
def test_what_is_no_proxys_address_is_refused_without_being_shown(url: str) -> None:
    with pytest.raises(ValueError, match="HTTPS_PROXY is http://") as caught:
        parse_proxy(url)
    assert "hu" not in str(caught.value).replace("host", "")


def test_a_tunnel_to_an_address_of_version_six_is_asked_for_in_brackets() -> None:
    assert Proxy("p", 1).connect_request("::1", 443).startswith(b"CONNECT [::1]:443 HTTP/1.1\r\nHost: [::1]:443\r\n")
