"""The lean lane against a real Valkey, and against sockets that misbehave."""

import asyncio
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from ibex.errors import ConfigurationError, StoreError, StoreRefused, StoreUnavailable
from ibex.stores.redis.connection import RedisAddress, open_connection
from ibex.stores.redis.lane import RedisLane, Script
from tests.valkey import Valkey, open_lane, run_valkey
from tests.waiting import eventually


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with run_valkey(
        "--port", "0", "--user", "reader", "on", ">sesame/1", "~*", "+@all", "-evalsha", "-client"
    ) as server:
        yield server


@asynccontextmanager
async def fake_redis(
    path: Path, answer: Callable[[list[bytes], asyncio.StreamWriter], Awaitable[None]]
) -> AsyncIterator[list[bytes]]:
    """A socket that answers the greeting and then as the test says. Yields what it read after that, read by read."""
    reads: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert b"SETNAME" in await reader.read(4096)
        writer.write(b"+OK\r\n")
        while data := await reader.read(1 << 16):
            reads.append(data)
            await answer(reads, writer)

    ended: list[asyncio.Event] = []
    async with await asyncio.start_unix_server(partial(serve_to_the_end, serve, ended), path):
        yield reads
        for connection in ended:
            await connection.wait()


async def serve_to_the_end(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    ended: list[asyncio.Event],
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    """Serve one connection and leave no transport open, so that none is found later in another test."""
    ended.append(end := asyncio.Event())
    try:
        with suppress(OSError):
            await serve(reader, writer)
    finally:
        with suppress(OSError):
            writer.close()
            await writer.wait_closed()
        end.set()


async def test_commands_are_answered_in_their_order(valkey: Valkey) -> None:
    async with open_lane(valkey.url) as lane:
        answers = await asyncio.gather(*(lane.call("ECHO", f"{number}") for number in range(200)))
        assert answers == [f"{number}".encode() for number in range(200)]


async def test_all_commands_of_a_tick_are_one_write(tmp_path: Path) -> None:
    async def answer(reads: list[bytes], writer: asyncio.StreamWriter) -> None:
        writer.write(b"+PONG\r\n" * reads[-1].count(b"PING"))

    async with fake_redis(tmp_path / "s", answer) as reads, open_lane(f"unix://{tmp_path}/s") as lane:
        await asyncio.gather(*(lane.call("PING") for _ in range(20)))
        assert [read.count(b"PING") for read in reads] == [20]


async def test_binary_arguments_and_numbers_arrive_as_they_are(valkey: Valkey) -> None:
    async with open_lane(valkey.url) as lane:
        value = bytes(range(256)) * 3
        await lane.call("SET", "binary", value)
        assert await lane.call("GET", b"binary") == value
        assert await lane.call("INCRBY", "number", 41) == 41
        assert await lane.call("GET", "nothing") is None


async def test_a_missed_deadline_leaves_the_order_of_replies_intact(valkey: Valkey) -> None:
    async with open_lane(valkey.url) as lane:
        slow = asyncio.ensure_future(lane.call("BLPOP", "no such list", "0.2", deadline=0.02))
        patient = [asyncio.ensure_future(lane.call("ECHO", f"{n}")) for n in range(3)]
        with pytest.raises(StoreUnavailable):
            await slow
        assert not any(call.done() for call in patient)
        assert await asyncio.gather(*patient) == [b"0", b"1", b"2"]
        assert await lane.call("ECHO", "after") == b"after"
        assert lane.is_connected


async def test_a_caller_that_left_leaves_the_order_of_replies_intact(valkey: Valkey) -> None:
    async with open_lane(valkey.url) as lane:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await lane.call("BLPOP", "no such list", "0.1")
        assert await lane.call("ECHO", "after") == b"after"


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_an_answer_that_lies_in_the_socket_after_a_stall_counts(
    valkey: Valkey, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """The stall sits in another socket's callback: uvloop looks at its timers after that and before the next read."""

    async def stall() -> None:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            async with open_lane(valkey.url, deadline=0.02) as lane:
                for _ in range(8):
                    call = asyncio.ensure_future(lane.call("ECHO", "there"))
                    loop.add_reader(ours, lambda: (ours.recv(1), time.sleep(0.04)))
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)
                    theirs.send(b"x")
                    assert await call == b"there"
                    loop.remove_reader(ours)

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(stall())


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_frozen_redis_fails_calls_loses_the_connection_and_comes_back(
    valkey: Valkey, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    async def freeze() -> None:
        async with open_lane(valkey.url, deadline=0.02) as lane:
            with valkey.frozen():
                for _ in range(3):
                    with pytest.raises(StoreUnavailable):
                        await lane.call("PING")
                assert not lane.is_connected
                with pytest.raises(StoreUnavailable):
                    await lane.call("PING")
            await eventually(lambda: lane.is_connected)
            assert await lane.call("ECHO", "back", deadline=1) == b"back"

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(freeze())


async def test_a_slow_redis_that_still_answers_keeps_its_connection(valkey: Valkey) -> None:
    async with open_lane(valkey.url, deadline=0.01) as lane:
        for _ in range(5):
            with pytest.raises(StoreUnavailable):
                await lane.call("BLPOP", "no such list", "0.1")
            await lane.call("PING", deadline=1)
        assert lane.is_connected


async def test_a_redis_that_is_not_there_is_found_when_it_comes() -> None:
    with run_valkey() as late:
        late.stop()
        async with open_lane(late.url) as lane:
            assert not lane.is_connected
            with pytest.raises(StoreUnavailable):
                await lane.call("PING")
            late.start()
            await eventually(lambda: lane.is_connected)
            assert await lane.call("PING") == b"PONG"
            late.stop()
            with pytest.raises(StoreUnavailable):
                await lane.call("PING")


async def test_calls_on_their_way_fail_when_the_lane_is_closed(valkey: Valkey) -> None:
    async with open_lane(valkey.url) as lane:
        call = asyncio.ensure_future(lane.call("BLPOP", "no such list", "10"))
        await asyncio.sleep(0.01)
    with pytest.raises(StoreUnavailable):
        await call


async def test_an_error_reply_is_refused_and_quotes_nothing_of_the_command(valkey: Valkey) -> None:
    async with open_lane(valkey.url) as lane:
        with pytest.raises(StoreRefused) as refused:
            await lane.call("SECRETCOMMAND", "secret argument")
        assert "secret" not in str(refused.value).lower()
        await lane.call("SET", "text", "x")
        with pytest.raises(StoreRefused, match="WRONGTYPE"):
            await lane.call("HGET", "text", "field")


@pytest.mark.parametrize("code", [b"READONLY", b"LOADING", b"OOM"])
async def test_an_error_that_passes_means_unavailable(tmp_path: Path, code: bytes) -> None:
    async def answer(reads: list[bytes], writer: asyncio.StreamWriter) -> None:
        writer.write(b"-" + code + b" not now\r\n")

    async with fake_redis(tmp_path / "s", answer), open_lane(f"unix://{tmp_path}/s") as lane:
        with pytest.raises(StoreUnavailable):
            await lane.call("PING")
        assert lane.is_connected is (code != b"READONLY")


@pytest.mark.parametrize("babble", [b"what is this\r\n", b"+PONG\r\n+unasked\r\n"])
async def test_a_server_that_babbles_is_left(tmp_path: Path, babble: bytes) -> None:
    async def answer(reads: list[bytes], writer: asyncio.StreamWriter) -> None:
        writer.write(babble)

    async with fake_redis(tmp_path / "s", answer), open_lane(f"unix://{tmp_path}/s") as lane:
        try:
            assert await lane.call("PING") == b"PONG"
        except StoreUnavailable:
            assert babble[:1] != b"+"
        await eventually(lambda: not lane.is_connected)


async def test_a_script_is_sent_again_when_redis_forgot_it(valkey: Valkey) -> None:
    script = Script("return {KEYS[1], ARGV[1]}")
    async with open_lane(valkey.url) as lane:
        for _ in range(2):
            await lane.call("SCRIPT", "FLUSH")
            assert await asyncio.gather(*(script.run(lane, ("k",), (n,)) for n in range(3))) == [
                [b"k", b"0"],
                [b"k", b"1"],
                [b"k", b"2"],
            ]


async def test_a_script_runs_by_its_text_where_its_digest_is_forbidden(valkey: Valkey) -> None:
    script = Script("return ARGV[1]")
    async with open_lane(f"unix://reader:sesame%2F1@{valkey.path}") as lane:
        assert await script.run(lane, (), ("one",)) == b"one"
        assert await script.run(lane, (), ("two",)) == b"two"


async def test_a_connection_authenticates_selects_and_gives_its_name(valkey: Valkey) -> None:
    async with open_lane(valkey.url) as lane:
        who = await lane.call("CLIENT", "INFO")
        assert b" name=ibex " in who
        assert b" db=3 " in who
    async with open_lane(f"unix://reader:sesame%2F1@{valkey.path}?db=2") as lane:
        assert await lane.call("ACL", "WHOAMI") == b"reader"


async def test_a_wrong_password_is_refused_and_not_repeated(valkey: Valkey, caplog: pytest.LogCaptureFixture) -> None:
    url = f"unix://reader:guesswork@{valkey.path}"
    with pytest.raises(StoreError) as refused:
        await open_connection(RedisAddress.parse(url))
    async with open_lane(url) as lane:
        assert not lane.is_connected
    assert "WRONGPASS" in str(refused.value)
    assert "guesswork" not in f"{refused.value!r} {RedisAddress.parse(url)!r} {caplog.text}"


async def test_a_password_alone_and_a_tcp_port_serve(unused_tcp_port: int) -> None:
    with run_valkey("--port", str(unused_tcp_port), "--requirepass", "p@ss"):
        async with open_lane(f"redis://:p%40ss@127.0.0.1:{unused_tcp_port}/5") as lane:
            assert b" db=5 " in await lane.call("CLIENT", "INFO")


async def test_tls_is_spoken_and_certificates_are_verified(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(4096):
            writer.write(b"+OK\r\n")

    certificate = make_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    ended: list[asyncio.Event] = []
    server = await asyncio.start_server(partial(serve_to_the_end, serve, ended), "127.0.0.1", 0, ssl=context)
    async with server:
        port = server.sockets[0].getsockname()[1]
        async with open_lane(f"rediss://localhost:{port}?ssl_ca_certs={certificate}") as lane:
            assert await lane.call("PING") == b"OK"
        with pytest.raises(StoreUnavailable, match="SSL"):
            await open_connection(RedisAddress.parse(f"rediss://localhost:{port}"))
        for connection in ended:
            await connection.wait()


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://", RedisAddress()),
        ("redis://cache:6380/2", RedisAddress(host="cache", port=6380, database=2)),
        ("redis://cache?db=4", RedisAddress(host="cache", database=4)),
        ("rediss://u:p%2Fw@cache", RedisAddress(host="cache", is_tls=True, username="u", password="p/w")),
        ("redis://[::1]:7000", RedisAddress(host="::1", port=7000)),
        ("unix:///run/r.sock?db=1", RedisAddress(path="/run/r.sock", database=1)),
        ("unix://:pw@/run/r%20x.sock", RedisAddress(path="/run/r x.sock", password="pw")),
        ("unix:///run/r.sock?password=pw", RedisAddress(path="/run/r.sock", password="pw")),
        ("unix://data/r.sock", RedisAddress(path="data/r.sock")),
    ],
)
def test_addresses_are_read(url: str, address: RedisAddress) -> None:
    assert RedisAddress.parse(url) == address


@pytest.mark.parametrize("url", ["", "http://x", "redis://x:port", "redis://:hush@x/db", "unix://", "redis://x:99999"])
def test_what_is_no_address_is_named_without_being_quoted(url: str) -> None:
    with pytest.raises(ConfigurationError, match="IBEX_REDIS_URL") as refused:
        RedisLane(url, deadline=1)
    assert "hush" not in str(refused.value)


def make_certificate(directory: Path) -> Path:
    """A key and a certificate for localhost that signs itself, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = directory / "localhost.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    return path
