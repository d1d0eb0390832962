"""Fixtures for every package's tests: a clean environment, a tiny checkpoint, one running pair of servers."""

from __future__ import annotations

import datetime
import ipaddress
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer

from checkpoint.synthetic import make_checkpoint
from preread_edge.logs import PACKAGES

ROOT = Path(__file__).parent.parent
KEPT = {"PREREAD_KALM_CHECKPOINT", "PREREAD_TEST_REDIS_SERVER"}
# Of the terminal, which decide how tables are cut and coloured, and of the way out, which tests never take.
OWN = {"COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"}
LOGGERS = ("", *PACKAGES)
START_SECONDS = 120

# The same examples in every run and on every machine; none fails by the clock, none comes out of a database.
settings.register_profile(
    "repeatable", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def clean_environment() -> None:
    """A developer's own settings must not reach the tests, nor signals that nohup or a shell ignores.

    An ignored signal is ignored by what a test starts, too; one with a handler is not.
    """
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    for name in os.environ.keys() - KEPT:
        if name.startswith(("PREREAD_", "OTEL_")) or name.upper() in OWN:
            del os.environ[name]


@pytest.fixture(autouse=True)
def process_as_before() -> Iterator[None]:
    """What a command sets for its whole process, which is the tests' here, ends with the test that ran it."""
    environment, directory, root = dict(os.environ), Path.cwd(), logging.getLogger()
    handlers, levels = root.handlers[:], {name: logging.getLogger(name).level for name in LOGGERS}
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)  # Hypothesis needs them
    torch.set_default_dtype(torch.float32)
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    os.chdir(directory)
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in a directory: three layers, two kv heads, sliding and full attention, a BPE tokenizer."""
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny-reranker")


@pytest.fixture(scope="session", params=["{passage}", "<Document>: {passage}"], ids=["bare", "template"])
def lossy_checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with a tokenizer that drops every character it was not trained on, as WordPiece does some."""
    settings = {"passage_template": request.param, "prompt_template": "{instruction} {query} :"}
    path = make_checkpoint(tmp_path_factory.mktemp("lossy") / "lossy-reranker", settings=settings)
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    tokenizer["model"] |= {"byte_fallback": False, "unk_token": None}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return path


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    """The tokenizer of the tiny checkpoint, with Gemma's control tokens."""
    return Tokenizer.from_file(str(tiny_checkpoint / "tokenizer.json"))


@pytest.fixture(scope="session")
def make_certificate() -> Callable[[Path, str], tuple[Path, Path]]:
    """make_certificate(directory, address): files of a self-signed certificate, its own authority, and its key."""
    return _make_certificate


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Files of a certificate of 127.0.0.1, and its key."""
    return _make_certificate(tmp_path_factory.mktemp("tls"), "127.0.0.1")


@pytest.fixture(scope="session")
def pem(certificate: tuple[Path, Path]) -> tuple[str, str]:
    """The same, as settings name them."""
    cert_file, key_file = certificate
    return str(cert_file), str(key_file)


def _make_certificate(directory: Path, address: str) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "preread test")])
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now - day, now + day)
    built = builder.add_extension(names, critical=False)
    built = built.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    cert_file, key_file = directory / "cert.pem", directory / "key.pem"
    cert_file.write_bytes(built.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return cert_file, key_file


@dataclass(frozen=True)
class ServerPair:
    """`preread serve` in a process of its own, both halves, on free ports."""

    address: str
    encoder_address: str
    store: str
    checkpoint: Path
    process: subprocess.Popen[bytes]


Serving = Callable[..., AbstractContextManager[ServerPair]]


@pytest.fixture(scope="session")
def serving(tiny_checkpoint: Path) -> Serving:
    """serving(directory, *flags) starts a pair whose store is in the directory, and stops it with the block."""
    return partial(_serving, tiny_checkpoint)


@pytest.fixture(scope="session")
def server_pair(serving: Serving, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerPair]:
    """One pair for all tests that only ask: take a collection name of your own."""
    with serving(tmp_path_factory.mktemp("server")) as pair:
        yield pair


@contextmanager
def _serving(checkpoint: Path, directory: Path, *flags: str) -> Iterator[ServerPair]:
    store = f"faiss:{directory / 'store'}"
    log = directory / "log"
    command = [sys.executable, "-m", "preread", "serve", "--model", str(checkpoint), "--store", store]
    command += ["--port", "0", "--encoder-port", "0", "--threads", "1", "--dtype", "float32", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output, env=environment) as process:
        try:
            _wait_until_ready(process, log)
            said = log.read_text()
            address = re.search(r"^listening\s+(\S+)", said, re.MULTILINE)
            encoder = re.search(r"^encoder\s+(\S+)", said, re.MULTILINE)
            assert address is not None
            assert encoder is not None
            yield ServerPair(address[1], encoder[1], store, checkpoint, process)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while "\nready" not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"`preread serve` did not become ready:\n{log.read_text()}")
        time.sleep(0.05)
