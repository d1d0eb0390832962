"""The embedded store, `faiss:PATH`: a directory, no server.

    PATH/catalogue.sqlite    passage id -> segment and rows, header, text; manifests, aliases, counters (SQLite, WAL)
    PATH/segments/*.faiss    immutable FAISS index files holding codes; a passage is a contiguous range of rows
    PATH/writer.lock         held while writing, so that writers take turns

A write puts its codes into a new segment file aside, fsyncs it, renames it, fsyncs the directory, and only then commits
the rows that point at it: after a crash a segment is either committed or an orphan that the next writer removes.
Readers take no lock. The directory must be on a local disk: file locks and SQLite's WAL do not work over NFS.
"""
