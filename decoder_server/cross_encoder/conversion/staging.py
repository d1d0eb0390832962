"""A folder that appears complete or not at all. Knows files, not what is in them."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from checkpoint.errors import CheckpointError


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """An empty folder beside `target`, which becomes `target` when the block ends well, and else is removed.

    What a killed process left there is removed by the next one; two at a time are refused.

    Raises:
        CheckpointError: `target` is taken, cannot be written, or is being written by another process.
    """
    target = Path(os.path.abspath(target))
    folder = target.parent / f".{target.name}.converting"
    _check_free(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as exc:
        raise CheckpointError(f"{target}: cannot be written ({exc.strerror})") from exc
    try:
        _take(lock, folder, target)
        try:
            yield folder
            for path in folder.iterdir():
                _sync(path)
            _sync(folder)
            _check_free(target)
            folder.rename(target)  # over an empty folder too
            _sync(target.parent)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _take(lock: int, folder: Path, target: Path) -> None:
    """Makes the folder ours and empty."""
    busy = CheckpointError(f"{target}: another process is converting into it")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        raise busy from exc
    # Between our mkdir and our lock the other may have finished: then what is locked is its result.
    if not folder.exists() or folder.stat().st_ino != os.fstat(lock).st_ino:
        raise busy
    for path in folder.iterdir():
        path.unlink()


def _check_free(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target}: exists and is not empty; expected a new directory")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
