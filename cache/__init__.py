"""Token states at rest: the value type, MEP pooling, codecs and stores.

Knows numpy, FAISS codecs, SQLite and Redis. Does not know what made the states or who scores with them: no torch, no
gRPC, no tokenizer. Import the modules by name (`from cache.store import open_store`); this one stays empty so that
importing a small part costs only that part.
"""
