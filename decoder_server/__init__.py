"""Online half: a query against passages that were encoded before it existed."""
