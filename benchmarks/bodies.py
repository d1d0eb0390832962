"""Large and hostile bodies, one after the other: how long do others wait meanwhile?

    python -m benchmarks.bodies [--mib 60] [--model preread/models/preread-mini]

Sends each body to a real `preread serve` from a separate process, and meanwhile asks, every 20 ms and from another
process than the server's, for /health and for one candidate over HTTP, for health and for one candidate over gRPC.
A row says how the body was answered, how long it took, the longest wait of each of the four, and how much memory the
server had gained at most. The law: none waits longer than 250 ms.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.common import report
from preread.v1 import rerank_pb2 as pb
from preread.v1 import rerank_pb2_grpc

MODEL = Path(__file__).parent.parent / "preread/models/preread-mini"
MIB = 1 << 20
PAUSE_SECONDS = 0.02
LIMIT_SECONDS = 0.25
TIMEOUT_SECONDS = 300
RERANK = "/v1/rerank"
PASSAGES = "/v1/collections/bodies/passages"


@dataclass(frozen=True)
class Body:
    """One body, made where it is sent. `call` is a path over HTTP, or a gRPC method."""

    name: str
    call: str
    make: Callable[[int], bytes]  # of about so many bytes
    kind: str = "application/json"
    chunk: int = 0  # bytes per HTTP chunk; 0: of a declared length

    @property
    def is_grpc(self) -> bool:
        return self.call.startswith("/preread.") or self.call.startswith("/tei.")


def _filled(head: bytes, unit: bytes, tail: bytes) -> Callable[[int], bytes]:
    return lambda size: head + unit * ((size - len(head) - len(tail)) // len(unit)) + tail


def _texts(word: str, count: int, more: str = "") -> Callable[[int], bytes]:
    def make(size: int) -> bytes:
        text = word * (size // count // len(word.encode()) - 1)
        return (
            json.dumps({"query": "q", "documents": [text] * count}, ensure_ascii=False)
            .replace("{", f"{{{more}", 1)
            .encode()
        )

    return make


def _field(number: int, content: bytes) -> bytes:
    size, head = len(content), bytearray()
    while size > 0x7F:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes((number << 3 | 2,)) + bytes(head) + bytes((size,)) + content


def _message(word: str, count: int, more: bytes = b"") -> Callable[[int], bytes]:
    """A RerankRequest of `count` candidates."""

    def make(size: int) -> bytes:
        text = (word * (size // count // len(word.encode()) - 1)).encode()
        return _field(1, b"q") + _field(3, _field(2, text)) * count + more

    return make


def _lines(size: int) -> bytes:
    line = json.dumps({"id": "p", "text": "x" * (15 * MIB)}).encode() + b"\n"
    return line * (size // len(line))


ONE_CANDIDATE = '{"query": "q", "documents": ["a passage"]}'
RETURN_TEXT = bytes((8 << 3, 1))
GRPC = "/preread.v1.RerankService/Rerank"
TEI = "/tei.v1.Rerank/Rerank"
DOCUMENTS = b'{"query": "q", "documents": ['
BODIES = (
    Body("1,000 texts", RERANK, _texts("some words ", 1000)),
    Body("1,000 texts, sent back", RERANK, _texts("some words ", 1000, '"return_documents": true, ')),
    Body("1,000 texts, Chinese", RERANK, _texts("中文", 1000)),
    Body("one text", RERANK, _texts("some words ", 1)),
    Body("one text of emoji", RERANK, _texts("😀", 1)),
    Body("one text of escapes", RERANK, _filled(DOCUMENTS + b'"', b"\\n", b'"]}')),
    Body("objects", RERANK, _filled(DOCUMENTS, b'{"a":0},', b"0]}")),
    Body("arrays", RERANK, _filled(DOCUMENTS, b"[],", b"0]}")),
    Body("numbers", RERANK, _filled(DOCUMENTS, b"0,", b"0]}")),
    Body("nested", RERANK, _filled(b"", b"[", b"")),
    Body("600,000 values", RERANK, lambda size: DOCUMENTS + b"[]," * 600_000 + b" " * (size - 2 * MIB) + b"0]}"),
    Body("space", RERANK, _filled(b"[", b" ", b"1]")),
    Body("one number", RERANK, _filled(b"[", b"1", b"]")),
    Body("a long name", RERANK, _filled(b'{"query": "q", "documents": ["d"], "', b"a", b'": 1}')),
    Body("a long model name", RERANK, _filled(b'{"query": "q", "documents": ["d"], "model": "', b"\\u0007", b'"}')),
    Body("a long query", RERANK, _filled(b'{"documents": ["d"], "query": "', b"a", b'"}')),
    Body("an unfinished string", RERANK, _filled(b'{"query": "', b"a", b"")),
    Body("no UTF-8", RERANK, _filled(b'{"query": "', b"a", b'\xff"}')),
    Body("pairs", "/score", _filled(b'{"pairs": [', b'["q","d"],', b'["q","d"]]}')),
    Body("chunks of one byte", RERANK, lambda size: _texts("some words ", 100)(size // 64), chunk=1),
    Body("passages", PASSAGES, _filled(b'{"passages": [', b'{"id":"p","text":"x"},', b'{"id":"p","text":""}]}')),
    Body("short lines", PASSAGES, _filled(b"", b"\n", b""), "application/x-ndjson"),
    Body("long lines", PASSAGES, _lines, "application/x-ndjson"),
    Body("a line of arrays", PASSAGES, lambda size: b"[" + b"[]," * (5 * MIB) + b"0]", "application/x-ndjson"),
    Body("gRPC: 1,000 texts", GRPC, _message("some words ", 1000)),
    Body("gRPC: 1,000 texts, sent back", GRPC, _message("some words ", 1000, RETURN_TEXT)),
    Body("gRPC: 1,000 texts, Chinese", GRPC, _message("中文", 1000)),
    Body("gRPC: one text", GRPC, _message("some words ", 1)),
    Body("gRPC: one text of emoji", GRPC, _message("😀", 1)),
    Body("gRPC: empty candidates", GRPC, _filled(_field(1, b"q"), _field(3, b""), b"")),
    Body("gRPC: 240,000 candidates", GRPC, lambda size: _field(1, b"q") + _field(3, b"") * 240_000),
    Body("gRPC: a candidate of many texts", GRPC, lambda size: _field(3, _field(2, b"") * (size // 2))),
    Body("gRPC: unknown fields", GRPC, _filled(_field(1, b"q"), bytes((15 << 3, 0)), b"")),
    Body(
        "gRPC: a long model name",
        GRPC,
        lambda size: _field(1, b"q") + _field(9, b"\a" * size) + _field(3, _field(2, b"d")),
    ),
    Body("gRPC: no UTF-8", GRPC, lambda size: _field(1, b"a" * size + b"\xff")),
    Body("gRPC, TEI: texts", TEI, lambda size: _field(1, b"q") + _field(2, b"some words " * 5000) * (size // 55_006)),
    Body("gRPC, TEI: empty texts", TEI, _filled(_field(1, b"q"), _field(2, b""), b"")),
)


def send(name: str, size: int, http_address: str, grpc_address: str, pipe: Connection) -> None:
    """In a separate process: makes the body, says so, sends it when told to, and tells how it was answered."""
    body = next(one for one in BODIES if one.name == name)
    data = body.make(size)
    pipe.send("made")
    pipe.recv()
    pipe.send(_send_grpc(body, data, grpc_address) if body.is_grpc else _send_http(body, data, http_address))


def _send_http(body: Body, data: bytes, address: str) -> str:
    connection = http.client.HTTPConnection(address, timeout=TIMEOUT_SECONDS)
    content: Any = data
    headers = {"content-type": body.kind}
    if body.chunk:
        framed = b"".join(b"1\r\n%c\r\n" % byte for byte in data) + b"0\r\n\r\n"
        headers["transfer-encoding"] = "chunked"
        content = (framed[i : i + 256_000] for i in range(0, len(framed), 256_000))
    try:
        connection.request("POST", body.call, content, headers)
        response = connection.getresponse()
        response.read()
        return str(response.status)
    except OSError as exc:  # refused, and closed before the body was sent
        return type(exc).__name__
    finally:
        connection.close()


def _send_grpc(body: Body, data: bytes, address: str) -> str:
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(address, options) as channel:
        try:
            channel.unary_unary(body.call)(data, timeout=TIMEOUT_SECONDS)
        except grpc.RpcError as exc:
            return str(exc.code().name)
    return "OK"


class Probes:
    """Four kinds of short calls, each on a thread, and how long each waited at most."""

    def __init__(self, http_address: str, channel: grpc.Channel) -> None:
        health, reranker = health_pb2_grpc.HealthStub(channel), rerank_pb2_grpc.RerankServiceStub(channel)
        request = pb.RerankRequest(query="q", candidates=[pb.Candidate(text="a passage")])
        check = health_pb2.HealthCheckRequest()
        self._connections = [http.client.HTTPConnection(http_address, timeout=TIMEOUT_SECONDS) for _ in range(2)]
        self._calls: dict[str, Callable[[], object]] = {
            "health": partial(_ask, self._connections[0], "GET", "/health"),
            "one candidate": partial(_ask, self._connections[1], "POST", RERANK, ONE_CANDIDATE),
            "gRPC health": lambda: health.Check(check, timeout=TIMEOUT_SECONDS),
            "gRPC, one candidate": lambda: reranker.Rerank(request, timeout=TIMEOUT_SECONDS),
        }
        for call in self._calls.values():
            call()  # the passage is encoded, the connections are open
        self._stop = threading.Event()
        self.longest = dict.fromkeys(self._calls, 0.0)

    @contextmanager
    def running(self) -> Iterator[None]:
        self._stop.clear()
        self.longest = dict.fromkeys(self._calls, 0.0)
        threads = [threading.Thread(target=self._run, args=(name,)) for name in self._calls]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def close(self) -> None:
        for connection in self._connections:
            connection.close()

    def _run(self, name: str) -> None:
        while not self._stop.is_set():
            begin = time.perf_counter()
            self._calls[name]()
            self.longest[name] = max(self.longest[name], time.perf_counter() - begin)
            time.sleep(PAUSE_SECONDS)


def _ask(connection: http.client.HTTPConnection, method: str, path: str, content: str | None = None) -> None:
    connection.request(method, path, content, {"content-type": "application/json"} if content else {})
    response = connection.getresponse()
    answered = response.read()
    if response.status != 200:
        raise RuntimeError(f"{path} was answered {response.status}: {answered!r:.200}")


@contextmanager
def serving(model: Path) -> Iterator[tuple[psutil.Process, str, str]]:
    """The process, its HTTP and its gRPC address."""
    with tempfile.TemporaryDirectory() as directory:
        command = [
            sys.executable,
            "-m",
            "preread",
            "serve",
            "--model",
            str(model),
            "--store",
            f"faiss:{directory}/store",
        ]
        command += ["--port", "0", "--encoder-port", "0", "--http-port", "0", "--log-level", "error", "--no-check"]
        command += ["--score-cache-bytes", "0"]
        log = Path(directory) / "log"
        with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
            try:
                deadline = time.monotonic() + 120
                while "\nready" not in (said := log.read_text()):
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise RuntimeError(f"the server did not start:\n{said}")
                    time.sleep(0.1)
                addresses = dict(re.findall(r"^(http|listening)\s+(?:http://)?(\S+)", said, re.MULTILINE))
                yield psutil.Process(process.pid), addresses["http"], addresses["listening"]
            finally:
                process.terminate()
                process.wait(60)


def run(model: Path, size: int, bodies: Sequence[Body] = BODIES) -> list[dict[str, Any]]:
    """A row for each body."""
    spawn = multiprocessing.get_context("spawn")
    rows = []
    with (
        serving(model) as (process, http_address, grpc_address),
        grpc.insecure_channel(grpc_address) as channel,
        closing(Probes(http_address, channel)) as probes,
    ):
        for body in bodies:
            ours, theirs = spawn.Pipe()
            sender = spawn.Process(target=send, args=(body.name, size, http_address, grpc_address, theirs))
            sender.start()
            ours.recv()
            before = most = process.memory_info().rss
            with probes.running():
                time.sleep(0.2)
                begin = time.perf_counter()
                ours.send("go")
                while not ours.poll(0.02):
                    most = max(most, process.memory_info().rss)
                answered, seconds = ours.recv(), time.perf_counter() - begin
                time.sleep(0.3)
            sender.join()
            ours.close()
            theirs.close()
            sender.close()
            waits = {name: round(wait * 1000) for name, wait in probes.longest.items()}
            rows.append(
                {"body": body.name, "answered": answered, "seconds": round(seconds, 1)}
                | {f"{name}, ms": wait for name, wait in waits.items()}
                | {"memory, MiB": round((most - before) / MIB)}
            )
            print(" ".join(f"{value}" for value in rows[-1].values()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=60, help="size of a body")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--only", default="", help="bodies with this in their name")
    args = parser.parse_args()
    bodies = [body for body in BODIES if args.only in body.name]
    rows = run(args.model, args.mib * MIB, bodies)
    longest = max(value for row in rows for name, value in row.items() if name.endswith(", ms"))
    print(f"the longest wait was {longest} ms; at most {LIMIT_SECONDS * 1000:g} are meant")
    if not args.only:
        report("bodies", list(rows[0]), [list(row.values()) for row in rows], mib=args.mib)


if __name__ == "__main__":
    main()
