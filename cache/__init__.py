"""Token states at rest: the value type, MEP pooling, codecs and stores.

Knows numpy, FAISS codecs, SQLite and Redis. Does not know what made the states or who scores with them: no torch, no
gRPC, no tokenizer. Import the modules by name (`from cache.store import open_store`); this one stays empty so that
importing a small part costs only that part.

Which codecs there are, in words, and the one taken where none is named. Imports nothing: help texts quote it.
"""

DEFAULT_CODEC = "SQfp16"
KNOWN_CODECS = "Flat, SQfp16, SQbf16, SQ8, SQ6, SQ4, [Z,]B<n>,SQ8 (or 6, 4), PQ<m>[x<bits>], RQ<m>x<bits>"
