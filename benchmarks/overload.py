"""Ten times what the server can do: every request answered, admitted ones on time, memory flat.

    python -m benchmarks.overload [--seconds 60] [--queue-seconds 2] [--candidates 64]

Finds the rate a real `preread serve` (the shipped model, --max-queue-seconds) sustains with a few
clients that wait for answers, then offers ten times that, open loop, half over gRPC and half over
HTTP, from threads of this process on the same cores. Clients do not try again. A request may wait
for its place for the queue's seconds, and the flood takes part of the cores that the rate was
measured on, so an admitted one should take at most three times them.

Every request has another query length and other candidates of a pool that was encoded before, so
that batches are of ever new sizes and the server's caches are full when the flood begins.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import psutil

from benchmarks.common import report
from preread.v1 import rerank_pb2 as pb
from preread.v1 import rerank_pb2_grpc

MODEL = Path(__file__).parent.parent / "preread/models/preread-mini"
SENTENCE = "The pooled states of its tokens are kept, and the decoder attends over them. "
POOL = [f"{i}. {SENTENCE * (1 + i % 7)}" for i in range(512)]
NUM_CALIBRATING = 4  # clients
NUM_CLIENTS = 160  # threads: more than the queue holds, or they would wait in it and offer no more
TIMES = 10
TIMEOUT_SECONDS = 60


@dataclass
class Tally:
    """What clients saw. Appending is atomic."""

    admitted: list[float] = field(default_factory=list)  # seconds
    refused: list[float] = field(default_factory=list)
    no_hint: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # any other answer, or none


class Questions:
    """Queries and candidates, another each time; the same ones in every run."""

    def __init__(self, seed: int, num_candidates: int) -> None:
        self._random = random.Random(seed)
        self._num_candidates = num_candidates

    def __next__(self) -> tuple[str, list[str]]:
        query = "which passages " + "really " * self._random.randrange(12) + "matter"
        return query, self._random.sample(POOL, self._num_candidates)


def grpc_caller(address: str, questions: Questions, tally: Tally) -> Callable[[], None]:
    # A separate connection: without this, channels of one process share one.
    channel = grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)])
    stub = rerank_pb2_grpc.RerankServiceStub(channel)

    def call() -> None:
        query, passages = next(questions)
        request = pb.RerankRequest(query=query, candidates=[pb.Candidate(text=text) for text in passages])
        begin = time.perf_counter()
        try:
            answer = stub.Rerank(request, timeout=TIMEOUT_SECONDS)
        except grpc.RpcError as exc:
            if exc.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                tally.wrong.append(f"gRPC {exc.code().name}")
                return
            tally.refused.append(time.perf_counter() - begin)
            if not any(
                key in ("retry-after", "grpc-retry-pushback-ms", "grpc-status-details-bin")
                for key, _ in exc.trailing_metadata() or ()
            ):
                tally.no_hint.append("gRPC")
            return
        tally.admitted.append(time.perf_counter() - begin)
        if answer.num_scored != len(passages):
            tally.wrong.append("gRPC: not every candidate scored")

    return call


def http_caller(address: str, questions: Questions, tally: Tally) -> Callable[[], None]:
    connection = http.client.HTTPConnection(address, timeout=TIMEOUT_SECONDS)

    def call() -> None:
        query, passages = next(questions)
        body = json.dumps({"query": query, "documents": passages})
        begin = time.perf_counter()
        try:
            connection.request("POST", "/v1/rerank", body, {"content-type": "application/json"})
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as exc:
            connection.close()
            tally.wrong.append(f"HTTP {type(exc).__name__}")
            return
        seconds = time.perf_counter() - begin
        if response.status == 429:
            tally.refused.append(seconds)
            if not response.headers["retry-after"]:
                tally.no_hint.append("HTTP")
        elif response.status != 200 or len(json.loads(content)["results"]) != len(passages):
            tally.wrong.append(f"HTTP {response.status}")
        else:
            tally.admitted.append(seconds)

    return call


def encode(address: str) -> None:
    """The whole pool, so that the flood finds the texts' states kept."""
    with grpc.insecure_channel(address) as channel:
        stub = rerank_pb2_grpc.RerankServiceStub(channel)
        for first in range(0, len(POOL), 64):
            some = [pb.Candidate(text=text) for text in POOL[first : first + 64]]
            stub.Rerank(pb.RerankRequest(query="q", candidates=some), timeout=TIMEOUT_SECONDS)


@contextmanager
def serving(queue_seconds: float) -> Iterator[tuple[psutil.Process, str, str]]:
    """The process, its gRPC and its HTTP address."""
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w") as log:
        command = [sys.executable, "-m", "preread", "serve", "--model", str(MODEL), "--store", "memory:"]
        command += ["--port", "0", "--encoder-port", "0", "--http-port", "0", "--score-cache-bytes", "0"]
        command += ["--max-queue-seconds", str(queue_seconds), "--log-level", "error"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        try:
            seen = ""
            for line in process.stdout:
                seen += line
                if line.startswith("ready"):
                    break
            rpc, web = (re.search(rf"^{name}\b.*?(127\.0\.0\.1:\d+)", seen, re.M) for name in ("listening", "http"))
            if rpc is None or web is None:
                raise RuntimeError(f"the server did not start:\n{seen}")
            threading.Thread(target=process.stdout.read, daemon=True).start()
            yield psutil.Process(process.pid), rpc[1], web[1]
        finally:
            process.terminate()
            process.wait(60)


def drive(callers: list[Callable[[], None]], seconds: float, rate: float | None) -> tuple[int, float]:
    """Requests sent, and the time until the last was answered; `rate` None: each as soon as the last is answered."""
    begin = time.perf_counter()
    numbers = itertools.count()
    sent = itertools.count()

    def work(call: Callable[[], None]) -> None:
        while True:
            due = begin + next(numbers) / rate if rate else time.perf_counter()
            if due >= begin + seconds or time.perf_counter() >= begin + seconds:
                return
            time.sleep(max(0.0, due - time.perf_counter()))
            next(sent)
            call()

    threads = [threading.Thread(target=work, args=(call,)) for call in callers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return next(sent), time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--queue-seconds", type=float, default=2.0)
    parser.add_argument("--candidates", type=int, default=64)
    args = parser.parse_args()
    with serving(args.queue_seconds) as (process, rpc, web):

        def callers(num: int, tally: Tally) -> list[Callable[[], None]]:
            every = [Questions(seed, args.candidates) for seed in range(num)]
            return [http_caller(web, q, tally) if i % 2 else grpc_caller(rpc, q, tally) for i, q in enumerate(every)]

        calm, busy = Tally(), Tally()
        encode(rpc)
        drive(callers(2, Tally()), 2, None)  # rates measured
        _, took = drive(callers(NUM_CALIBRATING, calm), max(3.0, args.seconds / 6), None)
        rate = len(calm.admitted) / took
        memory: list[float] = []
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.5):
                memory.append(process.memory_info().rss / 2**20)

        watcher = threading.Thread(target=watch)
        watcher.start()
        sent, _ = drive(callers(NUM_CLIENTS, busy), args.seconds, TIMES * rate)
        done.set()
        watcher.join()
    answered = len(busy.admitted) + len(busy.refused)
    rows: list[list[object]] = [
        ["sustained, requests/s", rate],
        ["offered, requests/s", sent / args.seconds],
        ["offered, times the sustained", sent / args.seconds / rate],
        ["sent", sent],
        ["answered, with success", len(busy.admitted)],
        ["answered, RESOURCE_EXHAUSTED or 429", len(busy.refused)],
        ["of these without a hint", len(busy.no_hint)],
        ["answered otherwise, or not at all", sent - answered + sum("scored" in one for one in busy.wrong)],
        ["stated latency of admitted ones, s", 3 * args.queue_seconds],
        ["admitted, median s", float(np.median(busy.admitted or [np.nan]))],
        ["admitted, 99 %, s", float(np.quantile(busy.admitted or [np.nan], 0.99))],
        ["admitted, slowest, s", max(busy.admitted, default=float("nan"))],
        ["refused, 99 %, s", float(np.quantile(busy.refused or [np.nan], 0.99))],
        ["memory when the flood began, MiB", memory[0]],
        *[[f"memory, quarter {i + 1}, MiB", float(np.mean(part))] for i, part in enumerate(np.array_split(memory, 4))],
    ]
    report("overload", ["", "value"], rows, seconds=args.seconds, candidates=args.candidates, wrong=busy.wrong[:20])


if __name__ == "__main__":
    main()
