"""The embedded store: FAISS segments and a SQLite catalogue in one directory."""
