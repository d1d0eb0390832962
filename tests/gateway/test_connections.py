"""What happens on the socket: bytes that are no HTTP, TLS, clients that leave, a server that stops."""

from __future__ import annotations

import datetime
import ipaddress
import json
import socket
import ssl
import threading
import time
from pathlib import Path

import httpx2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


def until(holds, seconds=10):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[str, str]:
    """Files of a certificate for 127.0.0.1 that signs itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    (tmp_path / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "key.pem").write_bytes(pem)
    return str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")


@pytest.mark.parametrize("sent", [b"hello\r\n\r\n", b"GET / HTTP/1.1\r\nno header\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"])
def test_what_is_no_http_gets_json_too(running, sent):
    with socket.create_connection(("127.0.0.1", running.gateway.port), timeout=10) as client:
        client.sendall(sent)
        head, _, body = b"".join(iter(lambda: client.recv(65536), b"")).partition(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 400")
    assert b"x-request-id: " in head.lower()
    assert json.loads(body)["error"]["message"]


def test_tls(run, certificate, query, documents):
    cert, key = certificate
    body = {"query": query, "documents": documents}
    with run(tls_cert_file=cert, tls_key_file=key) as secured:
        url = f"https://127.0.0.1:{secured.gateway.port}/v1/rerank"
        trusting = ssl.create_default_context(cafile=cert)
        assert httpx2.post(url, json=body, verify=trusting).status_code == 200
        with pytest.raises(httpx2.HTTPError):
            httpx2.post(url.replace("https", "http"), json=body)


def test_a_port_that_wants_certificates_of_grpc_callers_wants_them_here(run, certificate, query, documents):
    cert, key = certificate
    body = {"query": query, "documents": documents}
    with run(tls_cert_file=cert, tls_key_file=key, tls_client_ca_file=cert) as secured:
        url = f"https://127.0.0.1:{secured.gateway.port}/v1/rerank"
        nobody = ssl.create_default_context(cafile=cert)
        with pytest.raises(httpx2.HTTPError):
            httpx2.post(url, json=body, verify=nobody)
        known = ssl.create_default_context(cafile=cert)
        known.load_cert_chain(cert, key)
        assert httpx2.post(url, json=body, verify=known).status_code == 200


def test_an_uploader_that_leaves_ends_its_upload_only(running):
    """What was stored stays; what was still being gathered does not come."""

    def num_stored():
        found = running.http.get("/v1/collections/left")
        return found.json()["num_passages"] if found.status_code == 200 else 0

    line = b'{"id": "x%d", "text": "some text"}\n'
    head = "POST /v1/collections/left/passages HTTP/1.1\r\nhost: x\r\ncontent-type: application/x-ndjson\r\n"
    with socket.create_connection(("127.0.0.1", running.gateway.port)) as client:
        client.sendall(f"{head}content-length: 1000000\r\n\r\n".encode() + b"".join(line % i for i in range(200)))
        until(lambda: num_stored() >= 64)
    assert len(running.ask()["results"]) == 4
    assert 64 <= num_stored() < 200


def test_what_runs_is_answered_when_the_server_stops(run):
    with run() as one:
        one.ask()
        one.backend.gate.clear()
        one.backend.entered.clear()
        answers = []
        asking = threading.Thread(target=lambda: answers.append(one.ask()))
        asking.start()
        assert one.backend.entered.wait(10)
        stopping = threading.Thread(target=lambda: one.call(one.gateway.stop(20)))
        stopping.start()
        until(lambda: one.gateway.context.draining)
        until(lambda: not _accepts(one.gateway.port))
        one.backend.gate.set()
        asking.join()
        stopping.join()
    assert len(answers[0]["results"]) == 4


def _accepts(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
