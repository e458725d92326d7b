"""The balancers' example configurations, before two nodes: streams arrive as they are sent, and both nodes serve."""

import asyncio
import contextlib
import json
import os
import shutil
import ssl
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp
import pytest

from ibex.telemetry import spawn
from tests.network.calls import headers_of, make_chat
from tests.network.conftest import Cluster, Node
from tests.network.wiring import PROVIDER

BALANCER = Path(__file__).resolve().parents[2] / "infra" / "balancer"
URL = f"https://{PROVIDER}"
GAP_SECONDS = 0.2
TRUSTING = ssl.create_default_context()
TRUSTING.check_hostname, TRUSTING.verify_mode = False, ssl.CERT_NONE


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
def running(
    cluster: Cluster, place: Path, prepare: Callable[[Path, str], list[str]], name: str, *nodes: Node
) -> Iterator[None]:
    """The balancer on the clients' machine before two nodes, with a certificate of its own."""
    if shutil.which(prepare.__name__) is None:
        pytest.skip(f"{prepare.__name__} is not installed")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1",
         "-subj", "/CN=ibex.example", "-keyout", place / "key.pem", "-out", place / "chain.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    (place / "chain-and-key.pem").write_text((place / "chain.pem").read_text() + (place / "key.pem").read_text())
    text = (BALANCER / name).read_text()
    for letter, node in zip("ab", nodes, strict=True):
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
    slow = {"sandbox": json.dumps({"events": 5, "gap_ms": GAP_SECONDS * 1000})}

    with running(cluster, tmp_path, prepare, name, cluster.a, cluster.b):
        async with cluster.client() as http:
            await until_it_serves(http)
            body = make_chat(stream=True, metadata=slow)
            request = http.post(f"{URL}/v1/chat/completions", json=body, headers=headers_of(tenant), ssl=TRUSTING)
            async with request as response:
                assert response.status == 200, (tmp_path / "log").read_text()
                clock = asyncio.get_running_loop().time
                arrivals = [(clock(), part) async for part in response.content.iter_any()]

    assert b"".join(part for _, part in arrivals).endswith(b"data: [DONE]\n\n")
    # five events, a gap before each but the first: were they kept back, they would have come at once
    assert arrivals[-1][0] - arrivals[0][0] > 2 * GAP_SECONDS


@pytest.mark.skipif("CHAOS_ROUNDS" not in os.environ, reason="a long test: make test-chaos")
async def test_a_node_that_leaves_is_missed_by_nobody(cluster: Cluster, tmp_path: Path) -> None:
    tenant = await cluster.make_tenant("who stays")
    leaving = cluster.make_node("leaving")
    leaving.environ["IBEX_SHUTDOWN_DELAY"] = "5"  # more than HAProxy's `inter` times `fall`
    leaving.start()
    answers = Counter[int]()

    with running(cluster, tmp_path, haproxy, "haproxy.cfg", cluster.b, leaving):
        async with cluster.client() as http:
            await until_it_serves(http)
            stop = spawn(asyncio.to_thread(leaving.stop), name="the stop of a node")
            while not stop.done():
                request = http.post(
                    f"{URL}/v1/chat/completions", json=make_chat(), headers=headers_of(tenant), ssl=TRUSTING
                )
                async with request as response:
                    await response.read()
                    answers[response.status] += 1
            await stop

    assert set(answers) == {200}
    by_both = (leaving.data_dir / "server.log").read_text().count('"route":"chat","status":200')
    assert 0 < by_both < answers[200]


async def until_it_serves(http: aiohttp.ClientSession) -> None:
    """Return when a node answers behind the balancer."""
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(aiohttp.ClientConnectionError):
                async with http.get(f"{URL}/ready", ssl=TRUSTING) as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.05)
