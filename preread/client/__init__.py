"""Typed clients of both services, sync and async. Imports only gRPC and the generated stubs."""

from preread.client.aio import AsyncClient, AsyncRerankingStream
from preread.client.channel import ClientOptions, TlsFiles
from preread.client.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    FieldViolation,
    InvalidRequest,
    NotFound,
    Overloaded,
    PermissionDenied,
    PrereadError,
    ServerError,
    Unauthenticated,
    Unavailable,
)
from preread.client.retry import RetryPolicy
from preread.client.sync import Client, RerankingStream
from preread.client.values import (
    Candidate,
    CollectionInfo,
    EncoderIdentity,
    EncoderInfo,
    ModelInfo,
    Passage,
    Reranking,
    RerankOptions,
    Result,
    Summary,
    Timings,
    UpsertResult,
)

__all__ = [
    "AsyncClient",
    "AsyncRerankingStream",
    "Cancelled",
    "Candidate",
    "Client",
    "ClientOptions",
    "CollectionInfo",
    "DeadlineExceeded",
    "EncoderIdentity",
    "EncoderInfo",
    "FailedPrecondition",
    "FieldViolation",
    "InvalidRequest",
    "ModelInfo",
    "NotFound",
    "Overloaded",
    "Passage",
    "PermissionDenied",
    "PrereadError",
    "RerankOptions",
    "Reranking",
    "RerankingStream",
    "Result",
    "RetryPolicy",
    "ServerError",
    "Summary",
    "Timings",
    "TlsFiles",
    "Unauthenticated",
    "Unavailable",
    "UpsertResult",
]
