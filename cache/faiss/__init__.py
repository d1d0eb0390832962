"""The embedded store, `faiss:PATH`: a directory, no server.

    PATH/catalogue.sqlite    passage id -> segment and rows, header, text; manifests, aliases, counters (SQLite, WAL)
    PATH/segments/*.faiss    immutable FAISS index files holding codes; a passage is a contiguous range of rows
    PATH/writer.lock         held while writing, so that writers take turns; number of acknowledged commits

A write puts its codes into a new segment file aside, fsyncs it, renames it, fsyncs the directory, and only then commits
the rows that point at it: after a crash a segment is either committed or an orphan that the next writer removes.
Readers take no lock. The directory must be on a local disk where it is written: file locks and SQLite's WAL do not work
over NFS. Where it cannot be written, any number of readers share it (`catalogue.py`).

Reads are checked: a passage's row against its record's header (`rows.py`), every other row by a checksum of its
columns (`failures.py`), the catalogue as a whole by `verify` (`audit.py`). Codes are read by offset into memory
(`segments.py`): a file that is truncated or replaced under a running process costs its passages, never the process.

Version 2 of the catalogue has those checksums, num_clipped and the number of commits. One of version 1 is read as it
lies, and brought up by the first write, after which software of that version refuses it. Its records stay as they are
until a compaction writes their headers again, with the passage id in their checksum.
"""
