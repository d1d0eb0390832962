"""What commands write: a file is replaced whole or not at all, a stream that is open is written to as it is."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from preread_edge.outputs import is_stdout, open_output, write_output

WRITE = "import sys; from preread_edge.outputs import write_output; write_output(sys.argv[1], 'new ä\\n')"


@pytest.mark.parametrize("name", ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "/dev/../dev/stdout"])
def test_appending_to_standard_output_keeps_what_was_there(tmp_path: Path, name: str) -> None:
    (tmp_path / "log").write_text("old\n")
    with (tmp_path / "log").open("a") as log:
        subprocess.run([sys.executable, "-c", WRITE, name], stdout=log, check=True, env={"PYTHONIOENCODING": "ascii"})
    assert (tmp_path / "log").read_text() == "old\nnew ä\n"
    assert is_stdout(name)


def test_any_other_open_descriptor_too(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("old\n")
    with (tmp_path / "log").open("a") as log:
        write_output(f"/dev/fd/{log.fileno()}", "new\n")
    assert (tmp_path / "log").read_text() == "old\nnew\n"


@pytest.mark.parametrize("old", ["old\n", None])
def test_a_block_that_raises_changes_nothing(tmp_path: Path, old: str | None) -> None:
    path = tmp_path / "out.run"
    if old is not None:
        path.write_text(old)

    def interrupted() -> None:
        with open_output(path) as file:
            file.write("half of it" * 100_000)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (path.read_text() if path.exists() else None) == old
    assert list(tmp_path.iterdir()) == ([path] if old is not None else [])


def test_a_killed_process_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "out.run"
    path.write_text("old\n")
    code = (
        "import os, signal, sys; from preread_edge.outputs import open_output\n"
        "with open_output(sys.argv[1]) as file:\n"
        "    file.write('x' * 1_000_000); file.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, path], check=False).returncode == -9
    assert path.read_text() == "old\n"


def test_a_file_keeps_its_mode_and_a_link_its_target(tmp_path: Path) -> None:
    path, link = tmp_path / "out", tmp_path / "link"
    path.write_text("old\n")
    path.chmod(0o640)
    link.symlink_to("out")
    write_output(link, "new\n")
    assert link.is_symlink()
    assert path.read_text() == "new\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_new_file_has_the_usual_mode(tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("")
    write_output(tmp_path / "new", b"\x00")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE, text=True) as reader:
        write_output(tmp_path / "pipe", "through\n")
        assert reader.communicate()[0] == "through\n"
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_what_cannot_be_written_fails_before_the_block(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "no" / "such" / "folder"):
        with pytest.raises(OSError), open_output(path):  # noqa: PT011 - any of them will do
            raise AssertionError("the block must not begin")
