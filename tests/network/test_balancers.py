"""The balancers' example configurations, before two nodes: streams arrive as they are sent, and both nodes serve."""

import asyncio
import contextlib
import json
import shutil
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp
import pytest

from tests.network.calls import headers_of, make_chat
from tests.network.conftest import Cluster
from tests.network.wiring import PROVIDER

BALANCER = Path(__file__).resolve().parents[2] / "infra" / "balancer"
URL = f"https://{PROVIDER}"
GAP_SECONDS = 0.2


def nginx(place: Path, text: str) -> list[str]:
    """nginx with the example included, in the foreground."""
    text = text.replace("/etc/ssl/ibex/chain.pem", str(place / "chain.pem"))
    text = text.replace("/etc/ssl/ibex/key.pem", str(place / "key.pem"))
    (place / "server.conf").write_text(text)
    paths = "".join(
        f"{kind}_temp_path {place}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (place / "nginx.conf").write_text(
        f"daemon off; pid {place}/pid; error_log stderr; events {{}}"
        f"http {{ access_log off; {paths} include {place}/server.conf; }}"
    )
    return ["nginx", "-p", str(place), "-c", str(place / "nginx.conf")]


def haproxy(place: Path, text: str) -> list[str]:
    """HAProxy with the example as it is, in the foreground."""
    (place / "haproxy.cfg").write_text(text.replace("/etc/ssl/ibex", str(place)))
    return ["haproxy", "-db", "-f", str(place / "haproxy.cfg")]


@contextlib.contextmanager
def running(cluster: Cluster, place: Path, prepare: Callable[[Path, str], list[str]], name: str) -> Iterator[None]:
    """The balancer on the clients' machine, with the nodes' addresses and a certificate of its own."""
    if shutil.which(prepare.__name__) is None:
        pytest.skip(f"{prepare.__name__} is not installed")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1",
         "-subj", "/CN=ibex.example", "-keyout", place / "key.pem", "-out", place / "chain.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    (place / "chain-and-key.pem").write_text((place / "chain.pem").read_text() + (place / "key.pem").read_text())
    text = (BALANCER / name).read_text()
    for letter, node in (("a", cluster.a), ("b", cluster.b)):
        text = text.replace(f"node-{letter}:8080", f"{node.machine.front}:8080")
    command = [*cluster.network.world.prefix, *prepare(place, text)]
    with (place / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.parametrize(("prepare", "name"), [(nginx, "nginx.conf"), (haproxy, "haproxy.cfg")])
async def test_a_stream_passes_a_balancer_as_it_is_sent(
    cluster: Cluster, tmp_path: Path, prepare: Callable[[Path, str], list[str]], name: str
) -> None:
    tenant = await cluster.make_tenant(f"behind {name}")
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    slow = {"sandbox": json.dumps({"events": 5, "gap_ms": GAP_SECONDS * 1000})}

    with running(cluster, tmp_path, prepare, name):
        async with cluster.client() as http:
            await _until_it_serves(http, trusting)
            body = make_chat(stream=True, metadata=slow)
            request = http.post(f"{URL}/v1/chat/completions", json=body, headers=headers_of(tenant), ssl=trusting)
            async with request as response:
                assert response.status == 200, (tmp_path / "log").read_text()
                clock = asyncio.get_running_loop().time
                arrivals = [(clock(), part) async for part in response.content.iter_any()]

    assert b"".join(part for _, part in arrivals).endswith(b"data: [DONE]\n\n")
    # five events, a gap before each but the first: were they kept back, they would have come at once
    assert arrivals[-1][0] - arrivals[0][0] > 2 * GAP_SECONDS


async def _until_it_serves(http: aiohttp.ClientSession, trusting: ssl.SSLContext) -> None:
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(aiohttp.ClientConnectionError):
                async with http.get(f"{URL}/ready", ssl=trusting) as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.05)
