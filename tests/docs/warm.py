"""A `preread` that has imported everything: a process that forks for each command, and what calls it.

    python warm.py SOCKET                     imports, listens, and forks
    python -IS warm.py SOCKET preread WORDS   the command: hands over its streams, directory and environment

The forked process is what `preread` would be seconds later: it runs the command's main() on the caller's streams. It
gets the caller's signals, ends with the caller, and hands on its exit status.
"""

from __future__ import annotations

import array
import json
import os
import select
import signal
import socket
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # the caller imports little: it starts once a command
    from collections.abc import Callable
    from typing import NoReturn

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Imported by a command's body, not by its module.
HEAVY = (
    "torch", "transformers", "transformers.models.auto.modeling_auto", "transformers.models.t5gemma2", "faiss", "redis",
    "cache.faiss.store", "cache.redis.store", "encoder_worker.server", "encoder_worker.indexing", "bm25s",
    "decoder_server.server", "decoder_server.models", "preread_cli.process", "tuning.health", "tuning.sweep",
    "ir_measures", "pyarrow.parquet", "matplotlib.pyplot",
)  # fmt: skip


def ask(path: str, words: list[str]) -> int:
    """Have the command run; its exit status."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        told = json.dumps({"words": words, "directory": os.getcwd(), "environment": dict(os.environ)}).encode()
        for number in FORWARDED:
            signal.signal(number, lambda received, _: connection.send(bytes([received])))
        streams = array.array("i", [0, 1, 2])
        connection.sendmsg([len(told).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
        connection.sendall(told)
        answer = connection.recv(1)
    return answer[0] if answer else 70


def wait_for_a_command(listener: socket.socket) -> None:
    """Returns in a forked process, which is to run the command; in this one, never."""
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            break
        connection.close()
        while os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG):  # the watchers of commands that have ended
            pass
    listener.close()
    size, ancillary, _, _ = connection.recvmsg(4, socket.CMSG_SPACE(12))
    streams = array.array("i", ancillary[0][2])
    told = json.loads(connection.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
    command = os.fork()
    if command == 0:
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        open_streams()
        os.chdir(told["directory"])
        os.environ.clear()
        os.environ.update(told["environment"])
        sys.argv = told["words"]
        return
    for stream in (0, 1, 2, *streams):
        os.close(stream)
    watch(connection, command)


def open_streams() -> None:
    """As Python does at its start: those of the process that forked know its log, which can seek."""
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", 1, "utf-8", "surrogateescape", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, "utf-8", "backslashreplace", closefd=False)  # noqa: SIM115


def watch(connection: socket.socket, command: int) -> None:
    """Hand signals on until the command has ended, and its status back; it ends with its caller."""
    ended = os.pidfd_open(command)
    while ended not in select.select([connection, ended], [], [])[0]:
        received = connection.recv(1)
        os.kill(command, received[0] if received else signal.SIGKILL)
        if not received:
            break
    status = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
    try:
        connection.send(bytes([status if status >= 0 else 128 - status]))
    finally:
        os._exit(0)


def main() -> None:
    if len(sys.argv) > 2:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
    import gc
    import importlib

    import preread_cli.terminal
    from preread_cli.main import _MODULES, main

    preread_cli.terminal.FIRST_LINE_SECONDS = 3600.0  # how far a command is after 10 s is the machine's to say

    for name in [f"preread_cli.commands.{module}" for module in _MODULES.values()] + list(HEAVY):
        importlib.import_module(name)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(sys.argv[1])
        listener.listen(32)
        gc.freeze()  # a collection in a forked process would copy every page
        wait_for_a_command(listener)
    end_with(main)


def end_with(main: Callable[[], None]) -> NoReturn:
    """Run it, and end the process as Python does, but for freeing what was imported: that takes a second of copying."""
    import atexit
    import threading
    import traceback

    status: object = 0
    try:
        main()
    except SystemExit as exc:
        status = exc.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    if not isinstance(status, int):
        print(status, file=sys.stderr)  # noqa: T201
    threading._shutdown()  # type: ignore[attr-defined]  # joins threads, and ends those of executors
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 1)


if __name__ == "__main__":
    main()
