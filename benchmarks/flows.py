"""Which product files each flow enters, and how many functions: the traces of docs/architecture.md.

    python -m benchmarks.flows [--list]

Each flow runs in a real `preread` process, on tiny random models, with a profile hook on every thread. A file counts if
one of its functions runs during the flow; generated stubs and imports do not count.

    gRPC            Rerank of two stored ids, the second call
    HTTP            the same over POST /v2/rerank
    cross-encoder   Rerank of two texts, the second call
    index           `preread index` of three passages in a JSONL file, from the moment its model has been loaded
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.common import table
from benchmarks.synthetic import make_cross_encoder
from checkpoint.synthetic import make_checkpoint
from preread import Client

ROOT = Path(__file__).resolve().parent.parent
NOT_PRODUCT = {"benchmarks", "tests", "training", "examples", "docs", "scripts", "deploy", ".venv"}
OPTIMIZED = 1  # of co_flags: a function's body; those of modules and classes lack it
QUERY, IDS = "what is deep learning", ["p0", "p1"]


class Trace:
    """Counts the product's functions that run while `recording`."""

    def __init__(self) -> None:
        self.recording = False
        self.starts_with = ""  # the function, as FILE:NAME, whose call starts the recording, and whose end ends it
        self.functions: set[tuple[str, str, int]] = set()
        self.transitions = 0
        self._last = threading.local()
        self._first: FrameType | None = None  # of that function

    def install(self) -> None:
        threading.setprofile(self._called)
        sys.setprofile(self._called)

    def _called(self, frame: FrameType, event: str, arg: object) -> None:
        if event == "return" and frame is self._first:
            self.recording, self.starts_with, self._first = False, "", None
        if event != "call" or not (self.recording or self.starts_with) or not frame.f_code.co_flags & OPTIMIZED:
            return
        path = product_path(frame.f_code.co_filename)
        if path is None or importing(frame):
            return
        if f"{path}:{frame.f_code.co_name}" == self.starts_with:
            self.recording, self._first = True, frame
        if not self.recording:
            return
        self.functions.add((path, frame.f_code.co_qualname, frame.f_code.co_firstlineno))
        if getattr(self._last, "path", path) != path:
            self.transitions += 1
        self._last.path = path

    def summary(self) -> dict[str, Any]:
        return {
            "files": sorted({path for path, *_ in self.functions}),
            "functions": len(self.functions),
            "transitions": self.transitions,
        }


def product_path(filename: str) -> str | None:
    """The file relative to the repository, or None where it is not the product's own."""
    if not filename.startswith(str(ROOT)) or "_pb2" in filename:
        return None
    path = os.path.relpath(filename, ROOT)
    return None if path.partition(os.sep)[0] in NOT_PRODUCT else path


def importing(frame: FrameType | None) -> bool:
    """Whether a module body is what called this."""
    while frame is not None:
        if frame.f_code.co_name == "<module>" and product_path(frame.f_code.co_filename):
            return True
        frame = frame.f_back
    return False


def child(output: Path, command: list[str]) -> None:
    """Runs `preread COMMAND` in this process. SIGUSR1 starts a recording, SIGUSR2 writes it.

    `index` is recorded from the call of encoder_worker.indexing.index to its end.
    """
    trace = Trace()

    def begin(*_: object) -> None:
        trace.functions.clear()
        trace.transitions = 0
        trace.recording = True

    def write(*_: object) -> None:
        trace.recording = False
        output.with_suffix(".part").write_text(json.dumps(trace.summary()))
        output.with_suffix(".part").rename(output)

    signal.signal(signal.SIGUSR1, begin)
    signal.signal(signal.SIGUSR2, write)
    trace.install()
    from preread_cli.main import main

    try:
        if command[0] == "index":
            trace.starts_with = "encoder_worker/indexing.py:index"
        sys.argv = ["preread", *command]
        main()
    finally:
        if command[0] == "index":
            write()


class Served:
    """A `preread serve` whose calls are recorded one at a time."""

    def __init__(self, output: Path, *flags: str) -> None:
        self._output = output
        ports = ["--port", "0", "--encoder-port", "0", "--http-port", "0", "--log-level", "warning", "--no-check"]
        ports += ["--max-staleness-seconds", "60"]  # an opened collection stays opened, however busy the machine is
        command = [sys.executable, "-m", "benchmarks.flows", "--child", str(output), "serve", *ports, *flags]
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self._process.stdout is not None
        said = []
        for line in self._process.stdout:
            said.append(line)
            if line.startswith("ready"):
                break
        else:
            raise RuntimeError("the server did not start:\n" + "".join(said))
        threading.Thread(target=self._process.stdout.read, daemon=True).start()
        words = {name: text.split() for name, _, text in (line.partition(" ") for line in said)}
        self.grpc, self.http = words["listening"][0], words["http"][0]

    def recorded(self, call: Callable[[str], object]) -> dict[str, Any]:
        """The trace of the second of two calls, of other queries: margins of the first are kept."""
        call("first query")
        time.sleep(0.2)  # the first call's background work ends
        self._process.send_signal(signal.SIGUSR1)
        time.sleep(0.1)
        call(QUERY)
        time.sleep(0.2)
        self._process.send_signal(signal.SIGUSR2)
        return read_trace(self._output)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(60)


def read_trace(path: Path) -> dict[str, Any]:
    while not path.exists():
        time.sleep(0.01)
    result: dict[str, Any] = json.loads(path.read_text())
    path.unlink()
    return result


def post(url: str, body: dict[str, Any]) -> bytes:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request) as response:
        content: bytes = response.read()
    return content


def trace_flows(folder: Path) -> dict[str, dict[str, Any]]:
    """Each flow's trace: its files, and how many functions and transitions between files."""
    model, cross = make_checkpoint(folder / "tiny"), make_cross_encoder(folder / "cross")
    passages, output, store = folder / "passages.jsonl", folder / "trace.json", f"faiss:{folder}/store"
    passages.write_text("".join(json.dumps({"id": one, "text": f"text of {one}"}) + "\n" for one in ["p0", "p1", "p2"]))
    flows = {}
    index = ["index", str(passages), "--collection", "docs", "--model", str(model), "--store", store]
    subprocess.run([sys.executable, "-m", "benchmarks.flows", "--child", str(output), *index], cwd=ROOT, check=True)
    flows["index"] = read_trace(output)
    server = Served(output, "--model", str(model), "--store", store)
    try:
        with Client(server.grpc) as client:
            flows["gRPC"] = server.recorded(lambda query: client.rerank(query, IDS, collection="docs"))
        body = {"documents": [{"id": one} for one in IDS], "collection": "docs"}
        flows["HTTP"] = server.recorded(lambda query: post(f"{server.http}/v2/rerank", body | {"query": f"{query}?"}))
    finally:
        server.stop()
    server = Served(output, "--model", str(cross), "--no-encoder", "--store", store)
    try:
        with Client(server.grpc) as client:
            flows["cross-encoder"] = server.recorded(lambda query: client.rerank(query, ["one text", "another"]))
    finally:
        server.stop()
    return flows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="name the files of each flow")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args, command = parser.parse_known_args()
    if args.child:
        child(args.child, command)
        return
    with tempfile.TemporaryDirectory() as folder:
        flows = trace_flows(Path(folder))
    print(
        table(
            ["flow", "files", "functions", "transitions"],
            [[n, len(f["files"]), f["functions"], f["transitions"]] for n, f in flows.items()],
        )
    )
    if args.list:
        for name, flow in flows.items():
            print(f"\n{name}", *flow["files"], sep="\n    ")


if __name__ == "__main__":
    main()
