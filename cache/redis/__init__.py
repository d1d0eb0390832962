"""The shared store: many services, one set of passages in Redis."""
