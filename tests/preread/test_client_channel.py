"""How a channel is opened: TLS from files, metadata with every call, explicit message limits."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import pytest

from preread import (
    AsyncClient,
    Client,
    ClientOptions,
    DeadlineExceeded,
    Overloaded,
    PrereadError,
    RetryPolicy,
    TlsFiles,
    Unavailable,
)

ONCE = RetryPolicy(budget_seconds=0)
# Of the words in which gRPC, OpenSSL and the system say it.
INTERNALS = ("backends", "last error", "ipv4", "HTTP/2", "SSL_", "TSI_", "recvmsg", "Socket", "Deadline Ex", "UNKNOWN")


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
    with Client(running.address, options=ClientOptions(retry=ONCE)) as plain, pytest.raises(Unavailable):
        plain.rerank("q", ["a"])


async def failures(address: str, tls: TlsFiles | None = None, seconds: float = 30.0) -> list[PrereadError]:
    """How a call of either client fails there."""
    options = ClientOptions(retry=ONCE, tls=tls, timeout_seconds=seconds)
    with Client(address, options=options) as client, pytest.raises(PrereadError) as one:
        client.list_models()
    async with AsyncClient(address, options=options) as other:
        with pytest.raises(PrereadError) as two:
            await other.list_models()
    return [one.value, two.value]


def expect(errors: list[PrereadError], address: str, reason: str, words: str) -> None:
    for error in errors:
        assert (error.reason, error.address) == (reason, address)
        assert error.message == f"the server at {address} {words}"
        assert not any(word in str(error) for word in INTERNALS)


@contextmanager
def listening(*, serves: bool) -> Iterator[str]:
    """Address of a web server, or of a socket that takes connections and never answers."""
    if not serves:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            yield f"127.0.0.1:{silent.getsockname()[1]}"
        return
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{web.server_port}"
        web.shutdown()


async def test_where_no_server_answers_the_error_says_what_was_seen() -> None:
    unreached = "could not be reached: "
    expect(await failures("127.0.0.1:1"), "127.0.0.1:1", "UNREACHABLE", unreached + "nothing listens there")
    nowhere = "no-such.invalid:50051"
    expect(await failures(nowhere), nowhere, "UNREACHABLE", unreached + "its name has no address")
    with listening(serves=True) as web:
        expect(await failures(web), web, "NOT_GRPC", unreached + "what listens there does not speak gRPC")
    with listening(serves=False) as silent:
        late = await failures(silent, seconds=0.2)
        expect(late, silent, "NO_ANSWER", "did not answer within the time limit")
    assert {type(error) for error in late} == {DeadlineExceeded}


async def test_tls_on_one_side_alone_or_of_strangers_is_said(
    scripted, scripted_with, certificate, make_certificate, tmp_path
) -> None:
    (cert, key), (others, others_key) = certificate, make_certificate(tmp_path, "127.0.0.9")
    secure = scripted_with(grpc.ssl_server_credentials([(key.read_bytes(), cert.read_bytes())]))
    renamed = scripted_with(grpc.ssl_server_credentials([(others_key.read_bytes(), others.read_bytes())]))
    (tmp_path / "no.pem").write_text("no certificate")
    for address, tls, reason, words in (
        (scripted.address, TlsFiles(cert), "NOT_TLS", "what listens there does not use TLS"),
        (secure.address, None, "CLOSED", "it closes the connection, as one with TLS does to plain text"),
        (secure.address, TlsFiles(), "UNTRUSTED", "no authority that is trusted here signed its certificate"),
        (renamed.address, TlsFiles(others), "TLS", "its certificate is for another name"),
        (
            secure.address,
            TlsFiles(tmp_path / "no.pem"),
            "TLS",
            "the PEM files given for TLS hold no certificate, or not its key",
        ),
    ):
        expect(await failures(address, tls), address, reason, f"could not be reached: {words}")


async def test_a_server_that_lacks_a_call_or_ends_during_one_is_named(scripted) -> None:
    older = "does not know this call: it is older than this client, or a server of another kind"
    expect(await failures(scripted.address), scripted.address, "UNKNOWN_CALL", older)

    def ending(request, context):
        scripted.server.stop(0).wait()

    scripted.service.script = [ending]
    with Client(scripted.address, options=ClientOptions(retry=ONCE)) as client, pytest.raises(Unavailable) as caught:
        client.rerank("q", ["a"])
    lost = "did not answer: the connection was lost"
    expect([caught.value], scripted.address, "UNREACHABLE", lost)


def test_the_words_of_a_server_stay_its_own(scripted, failing) -> None:
    """Those of another server that it asked itself, too."""
    message = "connections to all backends failing; last error: its worker is gone"
    scripted.service.script = [failing(grpc.StatusCode.UNAVAILABLE, message)]
    with Client(scripted.address, options=ClientOptions(retry=ONCE)) as client, pytest.raises(Unavailable) as caught:
        client.rerank("q", ["a"])
    assert (caught.value.message, caught.value.reason) == (f"{scripted.address}: {message}", "")


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
