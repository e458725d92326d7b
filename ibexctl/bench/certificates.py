"""A certificate authority for one benchmark, and the certificate it signs for a provider on loopback."""

import datetime
import ipaddress
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_LIFETIME = datetime.timedelta(days=2)


@dataclass(frozen=True, slots=True)
class Certificates:
    """Files in PEM."""

    authority: Path
    """What must be trusted."""
    server: Path
    """A key, and its certificate for 127.0.0.1."""


@contextmanager
def own_certificates() -> Iterator[Certificates]:
    """An authority and a server's certificate, made for the block and removed after it."""
    with TemporaryDirectory(prefix="ibex-bench-tls-") as directory:
        made = Certificates(Path(directory) / "authority.pem", Path(directory) / "server.pem")
        authority_key, server_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
        authority = _sign("ibex benchmark authority", authority_key, authority_key, is_authority=True)
        server = _sign("ibex benchmark provider", server_key, authority_key, is_authority=False)
        made.authority.write_bytes(authority.public_bytes(serialization.Encoding.PEM))
        made.server.touch(mode=0o600)
        made.server.write_bytes(_encode(server_key) + server.public_bytes(serialization.Encoding.PEM))
        yield made


def _sign(
    name: str, key: ec.EllipticCurvePrivateKey, signer: ec.EllipticCurvePrivateKey, *, is_authority: bool
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    extension: x509.ExtensionType = (
        x509.BasicConstraints(ca=True, path_length=None)
        if is_authority
        else x509.SubjectAlternativeName(
            [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]  # nginx checks names alone
        )
    )
    return (
        x509.CertificateBuilder()
        .subject_name(_named(name))
        .issuer_name(_named("ibex benchmark authority"))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + _LIFETIME)
        .add_extension(extension, critical=is_authority)
        .sign(signer, hashes.SHA256())
    )


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _encode(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
