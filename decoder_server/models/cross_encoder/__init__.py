"""Rerankers that read query and passage together, each the way it was published."""
