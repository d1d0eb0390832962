"""The shared store, `redis://`, `rediss://` and `redis+cluster://`: many services, one set of passages.

Keys, `preread` being the prefix (`?prefix=` in the URL):

    preread:manifests      hash    collection -> manifest JSON, codec table inside
    preread:aliases        hash    alias -> COLLECTION:CHECKSUM, xxh3_64 of "ALIAS:COLLECTION"; before, without it
    preread:generations    hash    collection -> a random number, another one after every write; survives a drop
    preread:p:COLLECTION:PASSAGE_ID    string    one packed record (record.py), with the store's TTL if it has one

There are no counters and no index of ids: they would drift as passages expire, and on a cluster could not be changed in
one step with the passages. Counting and listing scan the keys instead.
"""
