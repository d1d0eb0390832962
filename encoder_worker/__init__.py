"""The offline half: passages are read, encoded, pooled and stored, once. Does not know queries or scores."""
