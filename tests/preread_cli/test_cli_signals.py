"""Laws of stopping, by real processes: which signals drain a server, which do not, and that output does not matter."""

from __future__ import annotations

import array
import fcntl
import os
import re
import resource
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from preread.v1 import encoder_pb2, encoder_pb2_grpc, rerank_pb2, rerank_pb2_grpc

ROOT = Path(__file__).parents[2]
SERVING = health_pb2.HealthCheckResponse.SERVING

Start = Callable[..., tuple["subprocess.Popen[str]", grpc.Channel]]


@pytest.fixture
def start(tiny_checkpoint: Path, tmp_path: Path) -> Iterator[Start]:
    """start(command, **of Popen): a server that is ready, and a channel to it. Its output has no reader any more."""
    processes: list[subprocess.Popen[str]] = []

    def run(command: str, **options: object) -> tuple[subprocess.Popen[str], grpc.Channel]:
        line = [sys.executable, "-m", "preread", command, "--model", str(tiny_checkpoint), "--port", "0"]
        line += [
            "--store",
            f"faiss:{tmp_path / 'store'}",
            "--threads",
            "1",
            "--dtype",
            "float32",
            "--grace-seconds",
            "60",
        ]
        line += ["--encoder-port", "0"] if command == "serve" else []
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        processes.append(
            subprocess.Popen(
                line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
            )
        )
        process, seen = processes[-1], ""
        assert process.stdout is not None
        assert process.stderr is not None
        for said in process.stdout:
            seen += said
            if said.startswith("ready"):
                break
        found = re.search(r"^listening\s+(\S+)", seen, re.MULTILINE)
        assert found is not None, seen + process.stderr.read()
        process.stdout.close()
        process.stderr.close()
        return process, grpc.insecure_channel(found[1])

    yield run
    for process in processes:
        process.kill()
        process.wait()


def status(channel: grpc.Channel) -> int:
    return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30).status


def send(process: subprocess.Popen[str], channel: grpc.Channel, number: signal.Signals) -> None:
    """Returns when the server says that it stops."""
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
    assert next(watch).status == SERVING
    process.send_signal(number)
    assert next(watch).status != SERVING


def test_a_server_finishes_what_runs(start: Start) -> None:
    process, channel = start("serve")
    texts = [f"{i} " + "one two three four five six seven eight " * 100 for i in range(80)]
    request = rerank_pb2.RerankRequest(query="q", candidates=[rerank_pb2.Candidate(text=text) for text in texts])
    with channel:
        answers = rerank_pb2_grpc.RerankServiceStub(channel).RerankStream(
            rerank_pb2.RerankStreamRequest(request=request), timeout=120
        )
        some = [next(answers)]
        send(process, channel, signal.SIGHUP)
        some += answers
    assert some[-1].summary.num_scored == len(texts)
    assert process.wait(60) == 0


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT], ids=lambda number: number.name)
def test_a_worker_finishes_what_runs(start: Start, number: signal.Signals) -> None:
    process, channel = start("encode-worker")
    told = threading.Event()

    def messages() -> Iterator[encoder_pb2.UpsertRequest]:
        for name in ("before", "after"):
            yield encoder_pb2.UpsertRequest(
                collection="docs", passages=[encoder_pb2.Passage(passage_id=name, text=f"the text {name}")]
            )
            told.wait(60)

    with channel:
        answers = encoder_pb2_grpc.EncoderServiceStub(channel).Upsert(messages(), timeout=120)
        some = [next(answers)]
        send(process, channel, number)
        process.send_signal(signal.SIGHUP)  # as service managers do; changes nothing
        told.set()
        some += answers
    assert [one.results[0].status for one in some] == [encoder_pb2.UPSERT_STATUS_STORED] * 2
    assert process.wait(60) == 0


def test_a_hangup_that_was_ignored_at_the_start_stays_ignored(start: Start) -> None:
    """As under nohup. A second SIGTERM ends the process, whatever runs. And few open files are made enough."""

    def begin() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    process, channel = start("encode-worker", preexec_fn=begin)
    assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE)[0] >= min(
        2 * 1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    )
    over = threading.Event()

    def messages() -> Iterator[encoder_pb2.UpsertRequest]:
        yield encoder_pb2.UpsertRequest(
            collection="docs", passages=[encoder_pb2.Passage(passage_id="a", text="the first")]
        )
        over.wait(120)

    with channel:
        process.send_signal(signal.SIGHUP)
        assert status(channel) == SERVING
        answers = encoder_pb2_grpc.EncoderServiceStub(channel).Upsert(messages(), timeout=120)
        next(answers)
        process.send_signal(signal.SIGHUP)
        assert status(channel) == SERVING
        send(process, channel, signal.SIGTERM)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM
        over.set()


def test_a_process_without_standard_streams(tiny_checkpoint: Path) -> None:
    """What it opens must not take their numbers."""
    script = "import os, sys; from preread_cli.main import main; sys.argv = ['preread', '--version']\n"
    script += (
        "try: main()\nfinally: os.write(9, b' '.join(os.readlink(f'/proc/self/fd/{n}').encode() for n in range(3)))"
    )
    read, write = os.pipe()

    def without() -> None:
        os.dup2(write, 9)
        for number in range(3):
            os.close(number)

    command, environment = [sys.executable, "-c", script], os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, preexec_fn=without, pass_fds=[9], env=environment, timeout=60)
    os.close(write)
    with open(read, "rb") as said:
        assert said.read() == b"/dev/null /dev/null /dev/null"


def test_a_server_whose_encoder_is_away_waits_and_can_be_stopped(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Behind a proxy that is dead, which the log names."""
    line = [sys.executable, "-m", "preread", "serve", "--model", str(tiny_checkpoint), "--store", f"faiss:{tmp_path}"]
    line += ["--port", "0", "--threads", "1", "--dtype", "float32", "--encoder-address", "worker.invalid:50052"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "http_proxy": "http://127.0.0.1:9"}
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            seen = next((said for said in process.stdout if said.startswith(("waiting", "ready"))), "")
            assert seen.startswith("waiting      not ready: an encoder does not answer")
            process.send_signal(signal.SIGTERM)
            said, errors = process.communicate(timeout=60)
            assert (process.returncode, "ready  " in said) == (0, False)
            assert "worker.invalid" in errors
            assert "http_proxy is set" in errors
        finally:
            process.kill()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_output_that_its_encoding_cannot_show_is_escaped(tmp_path: Path, encoding: str) -> None:
    """A model's path with letters from elsewhere does not end the command in another way than a path does."""
    command = [sys.executable, "-m", "preread", "doctor", "--model", str(tmp_path / "модель"), "--store", "memory:"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    done = subprocess.run(command, capture_output=True, env=environment, timeout=120)
    assert done.returncode == 1, done.stderr
    # click takes ASCII for a setting that no one meant, and writes UTF-8 there
    assert ("\\u043c" if encoding == "latin-1" else "модель").encode() in done.stdout
    assert not done.stderr


def test_a_signal_amid_a_write_to_standard_error_stops_an_index_run_too() -> None:
    script = (
        "import sys\nfrom preread_cli.commands.index import stopping\n"
        "with stopping() as stop:\n    print('begun', flush=True)\n    sys.stderr.write('x' * 500_000 + '\\n')\n"
        "    sys.stderr.flush()\n    print(stop.is_set())\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "begun\n"
        pipe, held = process.stderr.fileno(), array.array("i", [0])
        while held[0] < fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ):  # until the write has to wait
            fcntl.ioctl(pipe, termios.FIONREAD, held)
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "True\n"), err[-500:]
    assert "stopping: what is encoded is being stored" in err
