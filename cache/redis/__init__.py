"""The shared store, `redis://`, `rediss://` and `redis+cluster://`: many services, one set of passages.

Keys, `preread` being the prefix (`?prefix=` in the URL):

    preread:manifests      hash    collection -> manifest JSON, codec table inside
    preread:aliases        hash    alias -> COLLECTION:CHECKSUM
    preread:generations    hash    collection -> NUMBER:CHECKSUM, a random one after every write; survives a drop
    preread:p:COLLECTION:PASSAGE_ID    string    one packed record (record.py), with the store's TTL if it has one

A checksum is xxh3_64 of FIELD:VALUE in hex. Earlier versions wrote none; collections of version 1 still have a number
alone, which their writers count on from.

There are no counters and no index of ids: they would drift as passages expire, and on a cluster could not be changed in
one step with the passages. Counting and listing scan the keys instead.
"""
