"""Preread: passages are encoded once, queries are scored against their cached token states.

    from preread import Client

    with Client("127.0.0.1:50051") as client:
        for result in client.rerank("why is the sky blue", ["p1", "p2"], collection="docs"):
            print(result.score, result.passage_id)

Names are imported when they are first used: `import preread` needs no gRPC.
"""
# ruff: noqa: F403, F405 - __all__ lists what the modules give

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from preread.aio import *
    from preread.channel import *
    from preread.errors import *
    from preread.retry import *
    from preread.sync import *
    from preread.values import *

__all__ = [
    "AsyncClient", "AsyncPassages", "AsyncRerankingStream", "AsyncStream", "Cancelled", "Candidate", "Candidates",
    "Client", "ClientOptions", "CollectionInfo", "DeadlineExceeded", "Degraded", "EncoderIdentity", "EncoderInfo",
    "FailedPrecondition", "FieldViolation", "InvalidRequest", "Listed", "ModelInfo", "NotFound", "OnMiss",
    "Overloaded", "Passage", "Passages", "PermissionDenied", "PrereadError", "RerankOptions", "Reranking",
    "RerankingStream", "Result", "RetryPolicy", "ServerError", "Stage", "StageScore", "Status", "Stream",
    "Summary", "TierUse", "Timings", "TlsFiles", "Unauthenticated", "Unavailable", "UpsertResult", "UpsertStatus",
    "Warmed", "format_stages", "parse_stages",
]  # fmt: skip
_MODULES = tuple(f"preread.{name}" for name in ("values", "errors", "retry", "channel", "aio", "sync"))  # light first


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in map(importlib.import_module, _MODULES):
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module 'preread' has no attribute {name!r}")
