"""Models that read stored states: the decoder half of a T5Gemma 2 reranker, with its KV and prefix caches."""
