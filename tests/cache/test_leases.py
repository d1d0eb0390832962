"""Leases: a run of writes holds its collection, over threads, handles and processes, and no longer than it lives."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from cache.errors import InvalidName, StoreLocked
from cache.redis import leases

HOLD = """
import sys, cache.redis.leases as leases
from cache.errors import StoreLocked
from cache.open import open_store
leases.LEASE_SECONDS = 2.0
with open_store(sys.argv[1], read_budget_seconds=20).lease("docs") as check:
    print("held", flush=True)
    sys.stdin.readline()
    try:
        check()
        print("kept")
    except StoreLocked as exc:
        print(str(exc).partition(" since")[0])
"""
HERE = rf"'docs' is being written by process {os.getpid()} on {socket.gethostname()} since 20..-"
HERE_LOST = f"collection 'docs' is being written by process {os.getpid()} on {socket.gethostname()}\n".encode()


def hold(url: str) -> subprocess.Popen:
    """A process that holds docs until it is told a line, and then says whether it still did."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", HOLD, url]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert process.stdout.readline() == b"held\n"
    return process


def refused(store, collection: str, *, shared: bool = False) -> bool:
    try:
        with store.lease(collection, shared=shared) as check:
            check()
        return False
    except StoreLocked:
        return True


def test_one_alone_or_several_that_share(backend, store):
    other = backend.open()
    for _ in range(2):
        with store.lease("docs") as check:
            check()
            assert refused(other, "docs")
            assert refused(store, "docs")
            assert refused(other, "docs", shared=True)
            with pytest.raises(StoreLocked, match=HERE), other.lease("docs"):
                pass
            assert not refused(other, "docs-1")
            assert not refused(other, "passages")
        with ExitStack() as held:
            for one in (store, other, store):
                held.enter_context(one.lease("docs", shared=True))
            assert refused(other, "docs")
        with pytest.raises(KeyError), store.lease("docs"):
            raise KeyError
    assert not refused(other, "docs")
    with pytest.raises(InvalidName), store.lease("no name"):
        pass


def test_what_is_written_is_not_renamed(backend, store, make_manifest, make_record):
    store.write_manifest(make_manifest("docs"))
    for held in ("docs", "docs-1"):
        for shared in (False, True):
            with store.lease(held, shared=shared), pytest.raises(StoreLocked, match=f"'{held}'"):
                backend.open().rename_collection("docs", "docs-1", "docs")
    assert store.list_collections() == ["docs", "passages"]
    with store.lease("docs"):  # which keeps none from writing that did not ask
        store.put_many("docs", {"a": make_record(1)})
    assert store.rename_collection("docs", "docs-1", "docs") == ["docs"]
    assert not refused(store, "docs-1")


@pytest.mark.parametrize("name", ["faiss", "redis", "redis+cluster"])
def test_a_lease_ends_with_its_process(make_backend, name):
    backend = make_backend(name)
    store = backend.open()
    for kill in (True, False):
        process = hold(backend.url)
        with pytest.raises(StoreLocked, match=f"process {process.pid} "), store.lease("docs"):
            pass
        time.sleep(0 if name == "faiss" else 2.5)  # longer than a lease that is not kept alive
        assert refused(store, "docs", shared=True)
        if kill:
            process.kill()
        assert process.communicate(b"\n")[0] == (b"" if kill else b"kept\n")
        deadline = time.monotonic() + 30
        while refused(store, "docs"):
            assert kill
            assert time.monotonic() < deadline


def test_a_lease_that_another_writer_took_over_is_lost(make_backend):
    backend = make_backend("redis")
    store = backend.open()
    process = hold(backend.url)
    process.send_signal(signal.SIGSTOP)  # for longer than a lease lasts
    with ExitStack() as held:
        deadline = time.monotonic() + 30
        while refused(store, "docs"):
            assert time.monotonic() < deadline
        held.enter_context(store.lease("docs"))
        process.send_signal(signal.SIGCONT)
        assert process.communicate(b"\n")[0] == HERE_LOST
    assert not refused(store, "docs")


def test_a_server_that_lost_its_data_costs_no_lease(make_backend, monkeypatch):
    monkeypatch.setattr(leases, "LEASE_SECONDS", 0.3)
    backend = make_backend("redis")
    store = backend.open()
    with backend.server.client() as client, store.lease("docs") as check:
        client.delete(f"{backend.prefix}:w:docs")
        deadline = time.monotonic() + 30
        while not client.exists(f"{backend.prefix}:w:docs"):
            assert time.monotonic() < deadline
        check()
    assert not refused(store, "docs")


def test_a_writers_note_that_is_damaged_still_refuses(make_backend):
    store = make_backend("faiss").open()
    with store.lease("docs"):
        (file,) = (store.path / "writers").iterdir()
        file.write_bytes(b"\xff{")
        with pytest.raises(StoreLocked, match="'docs' is being written by another process"), store.lease("docs"):
            pass
    assert not list((store.path / "writers").iterdir())
