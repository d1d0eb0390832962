"""A failed call becomes the error that says what to do about it."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2 as details

from preread import (
    AsyncClient,
    Cancelled,
    Client,
    ClientOptions,
    DeadlineExceeded,
    FailedPrecondition,
    FieldViolation,
    InvalidRequest,
    NotFound,
    Overloaded,
    PermissionDenied,
    PrereadError,
    RetryPolicy,
    ServerError,
    TlsFiles,
    Unauthenticated,
    Unavailable,
)

ONCE = ClientOptions(retry=RetryPolicy(budget_seconds=0))
CLASSES = {
    "INVALID_ARGUMENT": InvalidRequest,
    "OUT_OF_RANGE": InvalidRequest,
    "NOT_FOUND": NotFound,
    "FAILED_PRECONDITION": FailedPrecondition,
    "UNAUTHENTICATED": Unauthenticated,
    "PERMISSION_DENIED": PermissionDenied,
    "RESOURCE_EXHAUSTED": Overloaded,
    "UNAVAILABLE": Unavailable,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "CANCELLED": Cancelled,
    "INTERNAL": ServerError,
    "UNIMPLEMENTED": ServerError,
    "DATA_LOSS": ServerError,
    "UNKNOWN": ServerError,
}


def failure(scripted, failing, code: str, *what) -> PrereadError:
    scripted.service.script = [failing(grpc.StatusCode[code], "because", *what)]
    with Client(scripted.address, options=ONCE) as client, pytest.raises(PrereadError) as caught:
        client.rerank("q", ["text"])
    return caught.value


@pytest.mark.parametrize("code", CLASSES)
def test_every_status_has_its_class(scripted, failing, code: str) -> None:
    error = failure(scripted, failing, code)

    assert type(error) is CLASSES[code]
    assert error.code == code
    assert "because" in str(error)


def test_details_are_unpacked(scripted, failing) -> None:
    violation = details.BadRequest.FieldViolation(field="top_n", description="top_n is -1; expected 0 or more")
    error = failure(
        scripted,
        failing,
        "INVALID_ARGUMENT",
        details.BadRequest(field_violations=[violation]),
        details.ErrorInfo(reason="RANGE", domain="preread", metadata={"b": "2", "a": "1"}),
        details.ResourceInfo(resource_type="collection", resource_name="docs"),
    )

    assert error.violations == (FieldViolation("top_n", "top_n is -1; expected 0 or more"),)
    assert (error.reason, error.metadata) == ("RANGE", (("a", "1"), ("b", "2")))
    assert (error.resource_type, error.resource_name) == ("collection", "docs")
    assert error.retry_after_seconds is None


def test_a_retry_hint_is_in_seconds(scripted, failing) -> None:
    hint = details.RetryInfo()
    hint.retry_delay.FromMilliseconds(1500)

    assert failure(scripted, failing, "RESOURCE_EXHAUSTED", hint).retry_after_seconds == 1.5


def test_trailers_that_are_no_status_are_ignored(scripted) -> None:
    def answer(request, context):
        context.set_trailing_metadata((("grpc-status-details-bin", b"\xff\xff\xff"),))
        context.abort(grpc.StatusCode.NOT_FOUND, "because")

    scripted.service.script = [answer]
    with Client(scripted.address, options=ONCE) as client, pytest.raises(NotFound, match="because"):
        client.rerank("q", ["text"])


async def test_the_async_client_raises_the_same(scripted, failing) -> None:
    violation = details.BadRequest.FieldViolation(field="query", description="empty")
    scripted.service.script = [
        failing(grpc.StatusCode.INVALID_ARGUMENT, "because", details.BadRequest(field_violations=[violation]))
    ]
    async with AsyncClient(scripted.address, options=ONCE) as client:
        with pytest.raises(InvalidRequest, match="because") as caught:
            await client.rerank("q", ["text"])
        with pytest.raises(InvalidRequest, match="because"):
            async for _ in client.rerank_stream("q", ["text"]):
                pass

    assert caught.value.violations[0].field == "query"


@pytest.mark.parametrize(
    ("address", "says"), [("127.0.0.1:1", "nothing listens there"), ("unix:/no.sock", "there is no such socket")]
)
def test_a_connection_that_fails_names_the_address_and_why(address: str, says: str) -> None:
    with Client(address, options=ONCE) as client, pytest.raises(Unavailable) as caught:
        client.list_models()
    assert str(caught.value) == f"the server at {address} could not be reached: {says}"


def test_tls_on_one_side_only_is_told_from_both(scripted, scripted_with, certificate) -> None:
    cert, key = certificate
    secured = scripted_with(grpc.ssl_server_credentials([(key.read_bytes(), cert.read_bytes())]))
    with_tls = ClientOptions(retry=ONCE.retry, tls=TlsFiles(cert))
    for address, options in ((scripted.address, with_tls), (secured.address, ONCE)):
        with Client(address, options=options) as client, pytest.raises(Unavailable, match="TLS"):
            client.list_models()
    with_others = ClientOptions(retry=ONCE.retry, tls=TlsFiles())
    with Client(secured.address, options=with_others) as client, pytest.raises(Unavailable, match="trusted here"):
        client.list_models()


def test_arguments_are_checked_before_anything_is_sent(scripted) -> None:
    with Client(scripted.address) as client:
        with pytest.raises(TypeError, match="candidates is a str"):
            client.rerank("q", "text")
        with pytest.raises(ValueError, match="on_miss is 'ignore'"):
            client.rerank("q", ["text"], on_miss="ignore")
        with pytest.raises(TypeError, match="unknown arguments"):
            client.rerank("q", ["text"], topn=3)
        with pytest.raises(ValueError, match="encoder_address"):
            client.describe()
    with pytest.raises(ValueError, match="host:port"):
        Client("localhost")

    assert scripted.service.requests == []
