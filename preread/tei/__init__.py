"""Stubs of other projects' contracts that preread also answers: Text Embeddings Inference."""
