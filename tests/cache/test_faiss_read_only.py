"""The embedded store where nothing can be written: a read-only mount, and a directory of another user."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import pytest

from cache.faiss.store import FaissStore

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("processes.py")
spec = importlib.util.spec_from_file_location("cache_test_processes", SCRIPT)
processes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(processes)

# In a mount namespace that ends with the process: nothing to clean up, and no other process sees it.
MOUNT = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && shift && exec "$@"'


def mounter() -> list[str] | None:
    """The command that may mount here, if any may: as root, or as the root of a user namespace."""
    for flags in ("-m", "-rm"):
        command = ["unshare", flags, "sh", "-c", MOUNT, "sh"]
        with suppress(FileNotFoundError):
            if subprocess.run([*command, "/tmp", "true"], capture_output=True, check=False).returncode == 0:
                return command
    return None


class Reader:
    """A process that is asked line by line."""

    def __init__(self, path: Path, how: str) -> None:
        before = mounter() if how == "mount" else None
        # Where nothing may mount, permissions show the same: what the directory refuses is what counts.
        before, user = ([*before, str(path)], "anyone") if before else ([], "unprivileged")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [*before, sys.executable, str(SCRIPT), "asked", str(path), user]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, line: str = "read") -> object:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate(timeout=30)


@contextmanager
def unwritable(path: Path):
    """A directory whose files anyone may read, and only root could write."""
    for directory in (path, path / "segments"):
        directory.chmod(0o555)
    try:
        yield
    finally:
        for directory in (path, path / "segments"):
            directory.chmod(0o755)


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that another user may look into: pytest's own may not be."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture
def path(place) -> Path:
    path = place / "store"
    write(path, 1, manifest=True)
    return path


def write(path: Path, seed: int, *, manifest: bool = False) -> None:
    """Write the same contents under four ids, and close, which folds the log in."""
    with closing(FaissStore(path)) as store:
        if manifest:
            store.write_manifest(processes.manifest())
        store.put_many("passages", dict.fromkeys(processes.PASSAGE_IDS[:4], processes.record(seed)))


def listed(path: Path) -> dict[str, int]:
    return {str(one.relative_to(path)): one.stat().st_mtime_ns for one in path.rglob("*")}


@pytest.mark.parametrize("how", ["mount", "permissions"])
def test_many_readers_share_a_store_that_none_can_write(path, how):
    with unwritable(path), ExitStack() as stack:
        before = listed(path)
        assert "catalogue.sqlite-wal" not in before
        readers = [stack.enter_context(closing(Reader(path, how))) for _ in range(3)]
        for _ in range(2):
            assert [reader.ask() for reader in readers] == [[1] * 4] * 3
        said = readers[0].ask("write")
        assert said.startswith("StoreAccessDenied"), said
        assert str(path) in said
        assert readers[0].ask() == [1] * 4
        assert listed(path) == before  # no log, no lock, no index of one


def test_a_store_that_may_not_be_looked_into_is_one_clear_error_of_every_call(path):
    with closing(Reader(path, "permissions")) as reader:
        path.chmod(0)
        try:
            for call in ("read", "write", "audit", "mend", "drop_collection", "scan"):
                said = reader.ask(call)
                assert said.startswith("StoreAccessDenied"), (call, said)
        finally:
            path.chmod(0o755)


@pytest.mark.parametrize("how", ["mount", "permissions"])
def test_what_is_written_elsewhere_is_noticed(path, place, how):
    with unwritable(path), closing(Reader(path, how)) as reader:
        assert reader.ask() == [1] * 4
        os.chmod(path, 0o755)
        write(path, 2)
        os.chmod(path, 0o555)
        assert reader.ask() == [2] * 4
        write(place / "other", 3, manifest=True)
        os.chmod(path, 0o755)
        shutil.copytree(place / "other" / "segments", path / "segments", dirs_exist_ok=True)
        os.rename(place / "other" / "catalogue.sqlite", path / "catalogue.sqlite")
        os.chmod(path, 0o555)
        assert reader.ask() == [3] * 4


@pytest.mark.parametrize("how", ["mount", "permissions"])
def test_a_log_that_cannot_be_applied_is_told_with_what_to_do(path, place, how):
    copy = place / "copy"
    with closing(FaissStore(path)) as writer:
        writer.put_many("passages", {"later": processes.record(5)})
        shutil.copytree(path, copy)  # as a writer that was killed leaves it
    (copy / "catalogue.sqlite-shm").unlink()
    with unwritable(copy), closing(Reader(copy, how)) as reader:
        said = reader.ask()
        assert said.startswith("StoreAccessDenied")
        assert "checkpoint it first" in said
        os.chmod(copy, 0o755)
        with closing(FaissStore(copy)) as writable:  # as `preread stats` does
            assert writable.stats("passages").num_passages == 5
        os.chmod(copy, 0o555)
        assert reader.ask() == [1] * 4


def test_a_closed_store_can_be_copied(path, place):
    with closing(FaissStore(path)) as reader:
        reader.list_collections()  # open beside the writer, so that SQLite would leave the log behind
        write(path, 4)
        log = path / "catalogue.sqlite-wal"
        assert not (log.exists() and log.stat().st_size)
        shutil.copytree(path / "segments", place / "copy" / "segments")
        shutil.copy(path / "catalogue.sqlite", place / "copy")
        with closing(FaissStore(place / "copy")) as copy:
            assert [processes.seed_of(one) for one in copy.get_many("passages", processes.PASSAGE_IDS[:4])] == [4] * 4
