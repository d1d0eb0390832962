"""A reader's machine for transcripts: real bash, curl, ports, stores and signals; only `preread` is imported before."""

from __future__ import annotations

import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from tests.docs.transcripts import Block, Step, pattern

GRPCURL = Path(__file__).with_name("grpcurl.py")
WARM = Path(__file__).with_name("warm.py")
PATIENCE_SECONDS = 120
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # as in other tests: several wait for each other where processors are busy
_UNSEEN = re.compile(r"\x1b\[[0-9;]*m|\r(?=\n)")  # curl shows names of headers in bold
COLUMNS = 120  # no line of a page is longer
PORTS = (50051, 50052, 8080, 9464)  # of gRPC, the encoder, HTTP and metrics, in pages
# The default ports: where `preread` listens and calls without a word, by command.
_WHERE = """
for word do case "$word" in -*) ;; *) break ;; esac; done
case "$word" in
serve) export PREREAD_PORT={50051} PREREAD_ENCODER_PORT=${PREREAD_ENCODER_PORT-{50052}} ;;
encode-worker) export PREREAD_PORT={50052} ;;
*) export PREREAD_ADDRESS=127.0.0.1:{50051} ;;
esac
""".strip()


class Warm:
    """The process that forks for every `preread`; see warm.py."""

    def __init__(self, directory: Path) -> None:
        self.socket = directory / "warm"  # of a short name: a socket's path has at most 107 bytes
        self._log = directory / "warm.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, WARM, self.socket], stdout=log, stderr=log, env=os.environ | ONE_THREAD
            )

    def wait(self) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self.socket.exists():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, "preread was not imported in time"
            time.sleep(0.02)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


class Running:
    """A command in a terminal: what it has shown, and its end."""

    def __init__(self, command: str, directory: Path, environment: Mapping[str, str], answers: str) -> None:
        self.shown = ""
        self.status: int | None = None  # while it runs
        self._news = threading.Condition()
        ours, its = pty.openpty()
        termios.tcsetwinsize(its, (24, COLUMNS))
        how = termios.tcgetattr(its)
        how[1] &= ~termios.OPOST  # lines end in LF alone
        how[3] &= ~termios.ECHO  # pages show what is typed; see transcripts.py
        termios.tcsetattr(its, termios.TCSANOW, how)
        os.write(ours, answers.encode())
        self._process = subprocess.Popen(
            ["bash", "-c", command], cwd=directory, env=environment, stdin=its, stdout=its, stderr=its,
            process_group=0,  # as a job of a shell: what it leaves in the background goes on
        )  # fmt: skip
        os.close(its)
        self._reader = threading.Thread(target=self._read, args=(ours,), daemon=True)
        self._reader.start()

    def _read(self, ours: int) -> None:
        shown = b""
        with suppress(OSError):  # how it ends: every process has closed its side
            while some := os.read(ours, 1 << 16):
                shown += some
                with self._news:
                    self.shown = _UNSEEN.sub("", shown.decode(errors="ignore"))  # the end may not be complete
                    self._news.notify_all()
        os.close(ours)
        with self._news:
            self.status = self._process.wait()
            self._news.notify_all()

    def wait_for(self, enough: Callable[[str], bool] = lambda shown: False) -> bool:
        """Until what it has shown is enough, or it has ended; whether that came in time."""
        with self._news:
            return self._news.wait_for(lambda: self.status is not None or enough(self.shown), PATIENCE_SECONDS)

    def signal(self, number: int) -> None:
        if self.status is None:
            os.killpg(self._process.pid, number)

    def stop(self) -> None:
        """End it as a service manager would."""
        self.signal(signal.SIGTERM)
        if not self.wait_for():
            self.signal(signal.SIGKILL)
        self._reader.join()


class Terminal:
    """Runs the steps of one page in a directory, on ports that are its own.

    `named` maps names that pages use to what stands for them here (`redis://cache:6379/0`, ports); both ways.
    """

    def __init__(self, directory: Path, warm: Warm, ports: Mapping[int, int], named: Mapping[str, str]) -> None:
        self.directory = directory
        self._named = dict(named) | {str(shown): str(real) for shown, real in ports.items()}
        self._servers: dict[str, Running] = {}
        self._status = 0
        self._kept = shlex.quote(str(directory / ".exported"))
        programs = directory / ".bin"
        programs.mkdir()
        call = shlex.join(["exec", sys.executable, "-IS", str(WARM), str(warm.socket), "preread"])
        where = _WHERE
        for shown, real in ports.items():
            where = where.replace(f"{{{shown}}}", str(real))
        (programs / "preread").write_text(f'#!/bin/sh\n{where}\n{call} "$@"\n')
        if shutil.which("grpcurl") is None:
            (programs / "grpcurl").write_text(f'#!/bin/sh\n{shlex.join(["exec", sys.executable, str(GRPCURL)])} "$@"\n')
        for program in programs.iterdir():
            program.chmod(0o755)
        own = {
            "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(warm.socket.parent),
        }
        own |= {"LC_ALL": "C.UTF-8", "TERM": "dumb"}  # without bars that are drawn over
        own |= {"TORCH_COMPILE_DISABLE": "1"}  # compiling takes seconds a server
        self._environment = {**os.environ, **own, **ONE_THREAD, "PYTHONUNBUFFERED": "1"}

    def run(self, block: Block) -> None:
        """Type and check what a block shows; an AssertionError says which line was not seen."""
        if block.file is not None:
            (self.directory / block.file).write_text(self._here("\n".join(block.lines) + "\n"))
        if block.language != "console":
            return
        steps = block.steps()
        for step, following in zip(steps, [*steps[1:], None], strict=True):
            self._type(step, may_fail=following is not None and following.command == "echo $?")

    def _type(self, step: Step, *, may_fail: bool) -> None:
        if step.server in self._servers:
            self._servers.pop(step.server).stop()
        script = f"[ -f {self._kept} ] && . {self._kept}; (exit {self._status})\n{self._here(step.command)}\n"
        if step.server is None:  # the next command finds the variables of this one
            script += f"status=$?; export -p >{self._kept}; exit $status"
        running = Running(script, self.directory, self._environment, answers="".join(step.answers))
        try:
            for before in step.interrupted:
                self._see(step, running, before, more=True)
                running.signal(signal.SIGINT)
            if step.server is not None and not step.interrupted:
                self._see(step, running, step.seen, more=True)
                if running.status is None:
                    self._servers[step.server] = running
                    return
            assert running.wait_for(), (
                f"line {step.line}: `{step.command}` does not end; it has shown:\n{running.shown}"
            )
            self._see(step, running, step.seen, more=False)
            self._status = running.status or 0
            assert may_fail or self._status == 0, (
                f"line {step.line}: `{step.command}` exits with {self._status}:\n{running.shown}"
            )
        finally:
            if running not in self._servers.values():
                running.stop()

    def _see(self, step: Step, running: Running, lines: list[str], *, more: bool) -> None:
        wanted = pattern(lines, more=more)
        running.wait_for(lambda shown: wanted.match(self._there(shown)) is not None)
        shown = self._there(running.shown)
        shown += "\n" if shown and not shown.endswith("\n") else ""  # curl ends without one
        if wanted.match(shown) is None:
            page = "\n".join(lines)
            raise AssertionError(f"line {step.line}: `{step.command}`\n--- the page shows\n{page}\n--- seen\n{shown}")

    def close(self) -> None:
        for running in self._servers.values():
            running.stop()

    def _here(self, text: str) -> str:
        return _renamed(text, self._named.items())

    def _there(self, text: str) -> str:
        return _renamed(text, ((real, shown) for shown, real in self._named.items()))


def _renamed(text: str, names: Iterable[tuple[str, str]]) -> str:
    for old, new in names:
        end = r"\b" if old[-1].isalnum() else ""
        text = re.sub(rf"(?<![\w.]){re.escape(old)}{end}", new, text)
    return text
