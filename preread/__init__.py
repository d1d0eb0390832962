"""Preread: passages are encoded once, queries are scored against their cached token states.

    from preread import Client

    with Client("127.0.0.1:50051") as client:
        for result in client.rerank("why is the sky blue", ["p1", "p2"], collection="docs"):
            print(result.score, result.passage_id)

Names are imported when they are first used: `import preread` needs no gRPC.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from preread.aio import AsyncClient, AsyncRerankingStream
    from preread.channel import ClientOptions, RetryPolicy, TlsFiles
    from preread.errors import (
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
    from preread.sync import Client, RerankingStream
    from preread.values import (
        Candidate,
        CollectionInfo,
        Degraded,
        EncoderIdentity,
        EncoderInfo,
        ModelInfo,
        Passage,
        Reranking,
        RerankOptions,
        Result,
        Stage,
        StageScore,
        Summary,
        TierUse,
        Timings,
        UpsertResult,
        Warmed,
        format_stages,
        parse_stages,
    )

__all__ = [
    "AsyncClient", "AsyncRerankingStream", "Cancelled", "Candidate", "Client", "ClientOptions", "CollectionInfo",
    "DeadlineExceeded", "Degraded", "EncoderIdentity", "EncoderInfo", "FailedPrecondition", "FieldViolation",
    "InvalidRequest", "ModelInfo", "NotFound", "Overloaded", "Passage", "PermissionDenied", "PrereadError",
    "RerankOptions", "Reranking", "RerankingStream", "Result", "RetryPolicy", "ServerError", "Stage", "StageScore",
    "Summary", "TierUse", "Timings", "TlsFiles", "Unauthenticated", "Unavailable", "UpsertResult", "Warmed",
    "format_stages", "parse_stages",
]  # fmt: skip
_MODULES = ("preread.values", "preread.errors", "preread.channel", "preread.aio", "preread.sync")  # light ones first


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in map(importlib.import_module, _MODULES):
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module 'preread' has no attribute {name!r}")
