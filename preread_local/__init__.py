"""Preread in one process, for notebooks, tests and small jobs: the methods of the client over models loaded here."""

from preread_local.reranker import AsyncReranker, Indexed, Reranker

__all__ = ["AsyncReranker", "Indexed", "Reranker"]
