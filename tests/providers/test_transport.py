"""The pool: which connection a request goes over, and whom it trusts."""

import asyncio
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ibex.providers.answer import ConnectionCut
from ibex.providers.transport import CertificateRefused, ConnectFailed, ConnectTimedOut, Transport, make_ssl_context
from tests.providers.upstream import LONG, Talk, answer_all, ask, open_transport, post, serve_script, until


async def test_a_request_is_one_head_and_its_body() -> None:
    async with serve_script(answer_all) as upstream, open_transport(upstream.base_url) as transport:
        answer = await transport.send(post(transport), b'{"a": 1}', [(b"traceparent", b"00-x")])
        assert (answer.status, answer.headers) == (200, {"content-type": "application/json"})
        assert await answer.read(100) == b"hi"
        authority = upstream.base_url.removeprefix("http://").removesuffix("/v1").encode()
        assert upstream.requests == [
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: " + authority + b"\r\nAccept: application/json\r\n"
            b'traceparent: 00-x\r\nContent-Length: 8\r\n\r\n{"a": 1}'
        ]


async def test_a_connection_is_kept_and_the_latest_one_is_used_first() -> None:
    async with serve_script(answer_all) as upstream, open_transport(upstream.base_url) as transport:
        for _ in range(3):
            assert await ask(transport) == b"hi"
        assert (upstream.connections, transport.idle_connections) == (1, 1)
        await asyncio.gather(*(ask(transport) for _ in range(5)))
        assert (upstream.connections, transport.idle_connections) == (5, 5)


async def test_no_more_connections_are_kept_than_allowed() -> None:
    async with serve_script(answer_all) as upstream, open_transport(upstream.base_url, max_idle=2) as transport:
        await asyncio.gather(*(ask(transport) for _ in range(5)))
        await until(lambda: transport.open_connections == 2)
        assert transport.idle_connections == 2


async def test_nobody_listening_is_a_failure_to_connect() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    async with open_transport(f"http://127.0.0.1:{port}") as transport:
        with pytest.raises(ConnectFailed, match="refused"):
            await ask(transport)


async def test_a_name_that_is_none_is_a_failure_to_connect() -> None:
    async with open_transport("http://no-such-host.invalid") as transport:
        with pytest.raises(ConnectFailed):
            await ask(transport)


async def test_a_handshake_that_never_ends_is_given_up(certificates: Any) -> None:
    async def never_answer(talk: Talk) -> None:
        await talk.wait_for_end()

    async with serve_script(never_answer) as upstream:
        url = upstream.base_url.replace("http:", "https:")
        deadlines = replace(LONG, connect=0.1)
        async with open_transport(url, deadlines=deadlines, ssl_context=certificates.trusting()) as transport:
            with pytest.raises(ConnectTimedOut):
                await ask(transport)


async def test_tls_connections_are_verified_and_kept(certificates: Any) -> None:
    context = certificates.serving("127.0.0.1")
    async with (
        serve_script(answer_all, ssl_context=context) as upstream,
        open_transport(upstream.base_url, ssl_context=certificates.trusting()) as transport,
    ):
        for _ in range(3):
            assert await ask(transport, b"x" * 300_000) == b"hi"
        assert upstream.connections == 1


async def test_a_certificate_for_another_name_is_refused(certificates: Any) -> None:
    context = certificates.serving("example.org")
    async with (
        serve_script(answer_all, ssl_context=context) as upstream,
        open_transport(upstream.base_url, ssl_context=certificates.trusting()) as transport,
    ):
        with pytest.raises(CertificateRefused, match="certificate"):
            await ask(transport)
        assert upstream.requests == []


async def test_an_unknown_authority_is_refused_by_default(certificates: Any) -> None:
    context = certificates.serving("127.0.0.1")
    async with (
        serve_script(answer_all, ssl_context=context) as upstream,
        open_transport(upstream.base_url) as transport,
    ):
        with pytest.raises(CertificateRefused, match="certificate"):
            await ask(transport)


async def test_an_encrypted_body_that_only_the_close_ends_is_whole_at_the_close(certificates: Any) -> None:
    async def close(talk: Talk) -> None:
        await talk.hear()
        await talk.say(b"HTTP/1.1 200 OK\r\n\r\nhello")

    context = certificates.serving("127.0.0.1")
    async with (
        serve_script(close, ssl_context=context) as upstream,
        open_transport(upstream.base_url, ssl_context=certificates.trusting()) as transport,
    ):
        assert await ask(transport) == b"hello"


async def test_closing_the_transport_ends_calls_under_way() -> None:
    async def hang(talk: Talk) -> None:
        await talk.hear()
        await talk.wait_for_end()

    async with serve_script(hang) as upstream, open_transport(upstream.base_url) as transport:
        asking = asyncio.gather(ask(transport), return_exceptions=True)
        await until(lambda: len(upstream.requests) == 1)
        await transport.close()
        assert isinstance((await asking)[0], ConnectionCut)
        with pytest.raises(ConnectFailed):
            await ask(transport)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.org",
        "ftp://example.org",
        "http://",
        "http://user:secret@example.org",
        "http://h/v1?x=1",
        "http://h#f",
    ],
)
async def test_a_base_url_is_scheme_host_port_and_path(url: str) -> None:
    with pytest.raises(ValueError, match="base URL"):
        Transport(url)


@pytest.mark.parametrize(("name", "value"), [(b"a", b"b\r\nc: d"), (b"a\n", b"b"), (b"a", b"b\0"), (b"a", b"\xe9")])
async def test_a_header_field_cannot_hold_another(name: bytes, value: bytes) -> None:
    async with open_transport("http://127.0.0.1:1") as transport:
        with pytest.raises(ValueError, match="header field"):
            await transport.send(post(transport), b"{}", [(name, value)])


async def test_an_upstream_may_have_an_address_of_version_six(certificates: Any) -> None:
    for context in (None, certificates.serving("::1")):
        async with (
            serve_script(answer_all, ssl_context=context, host="::1") as upstream,
            open_transport(upstream.base_url, ssl_context=certificates.trusting()) as transport,
        ):
            assert await ask(transport) == b"hi"
            port = upstream.base_url.rpartition(":")[2].removesuffix("/v1")
            assert f"\r\nHost: [::1]:{port}\r\n".encode() in upstream.requests[0]


@pytest.mark.asyncio(loop_factories=["asyncio"])  # uvloop resolves names in C, where no test can answer for DNS
async def test_a_name_that_moves_is_followed_once_connections_are_worn(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = ["127.0.0.1"]
    resolve = socket.getaddrinfo

    def answer(host: str, *rest: Any, **options: Any) -> Any:
        return resolve(addresses[0] if host == "upstream.test" else host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    async with serve_script(answer_all) as old:
        port = int(old.base_url.rpartition(":")[2].removesuffix("/v1"))
        async with (
            serve_script(answer_all, host="127.0.0.2", port=port) as new,
            open_transport(f"http://upstream.test:{port}", deadlines=replace(LONG, life=0.3)) as transport,
        ):
            await ask(transport)
            await ask(transport)
            addresses[0] = "127.0.0.2"
            async with asyncio.timeout(20):
                while not new.requests:
                    await ask(transport)
            assert (old.connections, new.connections) == (1, 1)


async def test_a_worn_connection_is_not_kept() -> None:
    async with (
        serve_script(answer_all) as upstream,
        open_transport(upstream.base_url, deadlines=replace(LONG, life=1e-9)) as transport,
    ):
        for _ in range(3):
            assert await ask(transport) == b"hi"
        assert upstream.connections == 3
        await until(lambda: transport.open_connections == 0)


def test_a_file_of_authorities_must_hold_some(tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("nothing")
    for name, reason in (("empty.pem", "holds no certificates"), ("absent.pem", "cannot be read")):
        with pytest.raises(ValueError, match=rf"SSL_CERT_FILE: .*{name} {reason}"):
            make_ssl_context(tmp_path / name)
