"""The offline half: passages are read, encoded, pooled and stored, once.

Knows the checkpoint's encoder and the store. Does not know queries or scores.
"""
