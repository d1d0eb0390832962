"""Token states at rest: values, pooling, codecs and stores; numpy, FAISS, SQLite and Redis, no torch, no gRPC."""

DEFAULT_CODEC = "SQfp16"
KNOWN_CODECS = "Flat, SQfp16, SQbf16, SQ8, SQ6, SQ4, [Z,]B<n>,SQ8 (or 6, 4), PQ<m>[x<bits>], RQ<m>x<bits>"
