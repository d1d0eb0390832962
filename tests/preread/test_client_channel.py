"""How a channel is opened: TLS from files, metadata with every call, explicit message limits."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from preread import AsyncClient, Client, ClientOptions, Overloaded, RetryPolicy, TlsFiles, Unavailable


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate of 127.0.0.1 and its key, as PEM files."""
    directory = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "preread test")])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    cert_file, key_file = directory / "cert.pem", directory / "key.pem"
    cert_file.write_bytes(built.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return cert_file, key_file


@pytest.mark.parametrize("mutual", [False, True])
async def test_tls_from_files(scripted_with, certificate: tuple[Path, Path], mutual: bool) -> None:
    cert, key = certificate
    pair = (key.read_bytes(), cert.read_bytes())
    running = scripted_with(
        grpc.ssl_server_credentials([pair], cert.read_bytes() if mutual else None, require_client_auth=mutual)
    )
    own = (cert, key) if mutual else (None, None)

    with Client(running.address, options=ClientOptions(tls=TlsFiles(cert, *own))) as client:
        assert len(client.rerank("q", ["a"])) == 1
    async with AsyncClient(running.address, options=ClientOptions(tls=TlsFiles(cert, *own))) as other:
        assert len(await other.rerank("q", ["a"])) == 1
    once = RetryPolicy(max_attempts=1)
    with Client(running.address, options=ClientOptions(retry=once)) as plain, pytest.raises(Unavailable):
        plain.rerank("q", ["a"])


def test_tls_files_go_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="go together"):
        TlsFiles(cert_file=tmp_path / "cert.pem").credentials()


def test_metadata_goes_with_every_call(scripted) -> None:
    options = ClientOptions(metadata={"Authorization": "Bearer key"})
    with Client(scripted.address, options=options) as client:
        client.rerank("q", ["a"])

    assert scripted.service.metadata[0]["authorization"] == "Bearer key"


def test_a_message_over_the_limit_is_refused_and_not_tried_again(scripted) -> None:
    with Client(scripted.address, options=ClientOptions(max_message_bytes=1000)) as client, pytest.raises(Overloaded):
        client.rerank("q", ["x" * 2000])

    assert scripted.service.requests == []


def test_messages_may_be_far_over_grpcs_own_limit(scripted) -> None:
    """4 MiB is gRPC's limit for what a client receives."""
    with Client(scripted.address) as client:
        assert len(client.rerank("q", ["x"] * 300_000)) == 300_000


@pytest.mark.parametrize("bad", [{"timeout_seconds": 0}, {"max_message_bytes": 0}])
def test_options_name_their_bad_value(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        ClientOptions(**bad)
