"""Fixtures of the cache tests: real Redis servers, and every kind of store behind one face that can damage it."""

import importlib.util
import sqlite3
import sys
import uuid
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import pytest

from cache.collection import Manifest
from cache.memory import MemoryStore
from cache.open import open_store
from cache.read_cache import CachedStore
from cache.record import Record
from cache.states import text_digest
from cache.store import Store

_spec = importlib.util.spec_from_file_location("redis_fixture", Path(__file__).parents[1] / "redis_fixture.py")
redis_fixture = importlib.util.module_from_spec(_spec)
sys.modules["redis_fixture"] = redis_fixture
_spec.loader.exec_module(redis_fixture)
RedisServer = redis_fixture.RedisServer

DIM = 8
# Tests share two cores: the product's 100 ms would make them fail by the clock. test_redis_failures.py tests budgets.
SLOW_MACHINE = {"read_budget_seconds": 20.0}


def make_manifest(collection: str = "passages", **changes: object) -> Manifest:
    values = {
        "collection": collection, "fingerprint": "a" * 64, "checkpoint": "test/encoder", "dim": DIM,
        "max_passage_tokens": 1024, "passage_template": "{text}", "pooling_version": 1, "compression_ratio": 4,
    }  # fmt: skip
    return Manifest(**(values | changes))


def make_record(seed: int = 0, *, num_states: int = 3, text: str | None = None, truncated: bool = False) -> Record:
    """A record of SQfp16 codes at DIM, ratio 4, one window whose last group holds a single token."""
    rng = np.random.default_rng(seed)
    states = rng.standard_normal((num_states, DIM)).astype(np.float16)
    return Record.build(
        states.view(np.uint8),
        window_tokens=(4 * num_states - 3,),
        compression_ratio=4,
        truncated=truncated,
        text_digest=text_digest(text or str(seed)),
        binding=0,
        text=text,
    )


def same(left: object, right: object) -> bool:
    """Whether two records hold the same, all of it."""
    return (
        isinstance(left, Record)
        and isinstance(right, Record)
        and left.header == right.header
        and left.window_tokens == right.window_tokens
        and left.text == right.text
        and np.array_equal(left.codes, right.codes)
    )


class Backend(ABC):
    """One store's data: opened any number of times, and damaged behind its back."""

    def __init__(self) -> None:
        self._opened: list[Store] = []

    def open(self) -> Store:
        store = self._open()
        self._opened.append(store)
        return store

    def close(self) -> None:
        for store in self._opened:
            store.close()

    @abstractmethod
    def _open(self) -> Store: ...

    @abstractmethod
    def tamper(self, collection: str, passage_id: str, change) -> None:
        """Replace the stored bytes of a passage (or of its states, where they lie apart) by change(bytes)."""

    @abstractmethod
    def tamper_header(self, collection: str, passage_id: str, change) -> None:
        """Replace the stored header by change(bytes)."""


class MemoryBackend(Backend):
    def __init__(self) -> None:
        super().__init__()
        self.url = f"memory:{uuid.uuid4().hex}"

    def _open(self) -> Store:
        return open_store(self.url)

    def tamper(self, collection: str, passage_id: str, change) -> None:
        store = MemoryStore.shared(self.url.partition(":")[2])
        store._values[collection][passage_id] = change(store._values[collection][passage_id])
        store.close()

    tamper_header = tamper


class RedisBackend(Backend):
    def __init__(self, server: RedisServer, url: str, **options: object) -> None:
        super().__init__()
        self.server = server
        self.prefix = uuid.uuid4().hex
        self.url = f"{url}?prefix={self.prefix}"
        self.options = SLOW_MACHINE | options

    def _open(self) -> Store:
        return open_store(self.url, **self.options)

    def key(self, collection: str, passage_id: str) -> str:
        return f"{self.prefix}:p:{collection}:{passage_id}"

    def tamper(self, collection: str, passage_id: str, change) -> None:
        key = self.key(collection, passage_id)
        with self.server.client() as client:
            client.set(key, change(client.get(key)))

    tamper_header = tamper


class FaissBackend(Backend):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.url = f"faiss:{path}"

    def _open(self) -> Store:
        return open_store(self.url)

    def locate(self, collection: str, passage_id: str) -> tuple[Path, int, int]:
        """Segment file, offset and length of a passage's codes."""
        query = (
            "SELECT file_name, codes_offset + first_row * code_size, passages.num_states * code_size FROM passages "
            "JOIN segments USING (segment_id) JOIN collections ON passages.collection_id = collections.collection_id "
            "WHERE name = ? AND passage_id = ?"
        )
        connection = sqlite3.connect(self.path / "catalogue.sqlite")
        file_name, offset, length = connection.execute(query, (collection, passage_id.encode())).fetchone()
        connection.close()
        return self.path / "segments" / file_name, offset, length

    def tamper(self, collection: str, passage_id: str, change) -> None:
        path, offset, length = self.locate(collection, passage_id)
        content = path.read_bytes()
        changed = change(content[offset : offset + length])
        # A shorter value means a shorter file, written in place as a failing disk would; the maps stay as they are.
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(changed)
            if len(changed) < length:
                file.truncate()

    def tamper_header(self, collection: str, passage_id: str, change) -> None:
        connection = sqlite3.connect(self.path / "catalogue.sqlite")
        query = "SELECT header FROM passages WHERE passage_id = ?"
        (header,) = connection.execute(query, (passage_id.encode(),)).fetchone()
        connection.execute("UPDATE passages SET header = ? WHERE passage_id = ?", (change(header), passage_id.encode()))
        connection.commit()
        connection.close()


class CachedBackend(Backend):
    """The read cache in front of another backend; every handle has a separate one."""

    def __init__(self, behind: Backend) -> None:
        super().__init__()
        self.behind = behind
        self.tamper, self.tamper_header = behind.tamper, behind.tamper_header

    def _open(self) -> Store:
        return CachedStore(self.behind._open(), max_bytes=1 << 20)

    def tamper(self, collection: str, passage_id: str, change) -> None: ...

    def tamper_header(self, collection: str, passage_id: str, change) -> None: ...


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory):
    server = RedisServer(tmp_path_factory.mktemp("redis")).start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def redis_tls_server(tmp_path_factory, pem):
    server = RedisServer(
        tmp_path_factory.mktemp("redis-tls"),
        *("--tls-cert-file", pem[0], "--tls-key-file", pem[1]),
        *("--tls-ca-cert-file", pem[0], "--tls-auth-clients", "no"),
        tls=True,
    ).start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def redis_cluster_server(tmp_path_factory):
    server = RedisServer(tmp_path_factory.mktemp("redis-cluster"), "--cluster-enabled", "yes").start()
    redis_fixture.make_cluster(server)
    yield server
    server.stop()


@pytest.fixture
def make_backend(request, tmp_path):
    """Backends by name, made on demand and closed at the end."""
    made: list[Backend] = []

    def make(name: str) -> Backend:
        if name.startswith("cached:"):
            backend = CachedBackend(make(name.removeprefix("cached:")))
        elif name == "memory":
            backend = MemoryBackend()
        elif name == "faiss":
            backend = FaissBackend(tmp_path / "store")
        elif name == "redis":
            server = request.getfixturevalue("redis_server")
            backend = RedisBackend(server, server.url)
        elif name == "rediss":
            server = request.getfixturevalue("redis_tls_server")
            ca_file = request.getfixturevalue("pem")[0]
            backend = RedisBackend(server, server.url, tls_ca_file=ca_file)
        else:
            server = request.getfixturevalue("redis_cluster_server")
            backend = RedisBackend(server, server.url.replace("redis:", "redis+cluster:"))
        made.append(backend)
        return backend

    yield make
    for backend in reversed(made):
        backend.close()


STORES = [
    "memory",
    "faiss",
    "redis",
    "rediss",
    "redis+cluster",
    "cached:memory",
    "cached:faiss",
    "cached:redis",
    "cached:rediss",
    "cached:redis+cluster",
]


@pytest.fixture(params=STORES)
def backend(request, make_backend):
    return make_backend(request.param)


@pytest.fixture
def store(backend, make_manifest):
    store = backend.open()
    store.write_manifest(make_manifest())
    return store


# Helpers as fixtures: tests are not a package and cannot import them from here.


@pytest.fixture(name="make_manifest", scope="session")
def _make_manifest():
    return make_manifest


@pytest.fixture(name="make_record", scope="session")
def _make_record():
    return make_record


@pytest.fixture(name="same", scope="session")
def _same():
    return same
