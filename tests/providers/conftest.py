"""Both event loops for every test of the providers, and an upstream that says whatever a script says."""

import asyncio
import datetime
import ipaddress
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

Script = Callable[["Talk"], Awaitable[None]]


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}


@dataclass
class Talk:
    """The upstream's end of one connection."""

    number: int
    """Connections are counted from 1."""
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    requests: list[bytes] = field(default_factory=list)
    """All requests of all connections, heads and bodies."""

    async def hear(self) -> bytes:
        """The next request, head and body; ConnectionError or IncompleteReadError when there is none."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = next((int(line[16:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length: ")), 0)
        request = head + await self.reader.readexactly(length)
        self.requests.append(request)
        return request

    async def say(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()

    async def wait_for_end(self) -> None:
        """Until the client has closed."""
        try:
            while await self.reader.read(1 << 16):
                pass
        except ConnectionError:
            return


@dataclass
class Upstream:
    """A server that follows a script on each connection."""

    base_url: str
    requests: list[bytes] = field(default_factory=list)
    connections: int = 0
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """Set whenever a client has closed a connection that the script was waiting on."""


@asynccontextmanager
async def serve_script(script: Script, *, ssl_context: ssl.SSLContext | None = None) -> AsyncIterator[Upstream]:
    """Serve a script on each connection; whatever is still open at the end is cut."""
    talks: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        talks.add(task)
        upstream.connections += 1
        try:
            await script(Talk(upstream.connections, reader, writer, upstream.requests))
        except (ConnectionError, asyncio.IncompleteReadError):
            upstream.ended.set()
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            talks.discard(task)
            writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=ssl_context)
    port = server.sockets[0].getsockname()[1]
    upstream = Upstream(f"{'http' if ssl_context is None else 'https'}://127.0.0.1:{port}/v1")
    try:
        yield upstream
    finally:
        server.close()
        for task in tuple(talks):
            task.cancel()
        await asyncio.gather(*talks, return_exceptions=True)
        await server.wait_closed()


@dataclass(frozen=True)
class Certificates:
    """A certificate authority that nobody but the test trusts, and what it signed."""

    trusting: Callable[[], ssl.SSLContext]
    serving: Callable[[str], ssl.SSLContext]
    """A server's context for one name or address."""


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    directory = tmp_path_factory.mktemp("certificates")
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ibex test authority")])
    ca = _sign(ca_name, ca_name, ca_key.public_key(), ca_key, x509.BasicConstraints(ca=True, path_length=None))
    ca_pem = ca.public_bytes(serialization.Encoding.PEM)

    def trusting() -> ssl.SSLContext:
        return ssl.create_default_context(cadata=ca_pem.decode())

    def serving(name: str) -> ssl.SSLContext:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server")])
        certificate = _sign(
            subject, ca_name, key.public_key(), ca_key, x509.SubjectAlternativeName([_general_name(name)])
        )
        path = Path(directory, f"{name}.pem")
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            + certificate.public_bytes(serialization.Encoding.PEM)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        return context

    return Certificates(trusting, serving)


def _general_name(name: str) -> x509.GeneralName:
    return x509.IPAddress(ipaddress.ip_address(name)) if name[0].isdigit() else x509.DNSName(name)


def _sign(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    signing_key: ec.EllipticCurvePrivateKey,
    extension: x509.ExtensionType,
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(extension, critical=False)
        .sign(signing_key, hashes.SHA256())
    )


@pytest.fixture
def upstream_for() -> Callable[..., object]:
    """`async with upstream_for(script) as upstream`."""
    return serve_script
