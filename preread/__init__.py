"""Preread: passages are read once, queries are answered from their cached token states.

    from preread import Client

    with Client("127.0.0.1:50051") as client:
        for result in client.rerank("why is the sky blue", ["p1", "p2"], collection="docs"):
            print(result.score, result.passage_id)

Names are imported when they are first used: `import preread` needs neither torch nor gRPC.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from preread.client import (
        AsyncClient,
        Candidate,
        Client,
        PrereadError,
        Reranking,
        Result,
    )

__all__ = ["AsyncClient", "Candidate", "Client", "PrereadError", "Reranking", "Result"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("preread.client"), name)
    raise AttributeError(f"module 'preread' has no attribute {name!r}")
