"""Real redis-servers for tests, on free ports of 127.0.0.1, with their data in a temporary directory.

A conftest.py takes it over by path (tests are not a package):

    spec = importlib.util.spec_from_file_location("redis_fixture", Path(__file__).parents[1] / "redis_fixture.py")
"""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

_NO_RETRY = Retry(NoBackoff(), 0)  # the default would turn waiting for a start into seconds


def redis_binary() -> str:
    """redis-server from PREREAD_TEST_REDIS_SERVER or PATH; its absence is a failure, not a skip."""
    binary = os.environ.get("PREREAD_TEST_REDIS_SERVER") or shutil.which("redis-server")
    if binary is None or not os.access(binary, os.X_OK):
        raise RuntimeError(
            "redis-server is needed by these tests and was not found on PATH; install it (Debian: apt-get install "
            "redis-server) or name the binary in PREREAD_TEST_REDIS_SERVER"
        )
    return binary


NUM_TRIES = 5
MAX_PORT = 55_535  # a cluster's nodes talk on the port 10,000 above, which has to exist


def free_port() -> int:
    while True:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = int(listener.getsockname()[1])
        if port <= MAX_PORT:
            return port


class PortTakenError(RuntimeError):
    """Another process listens on a port that was free a moment ago."""


class RedisServer:
    """One server process; may be killed and started again on the same port, keeping its data if it saves."""

    def __init__(self, directory: Path, *arguments: str, port: int | None = None, tls: bool = False) -> None:
        self.directory = directory
        self._chosen = port is None
        self.port = port or free_port()
        self.arguments = arguments
        self.is_tls = tls
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis{'s' * self.is_tls}://127.0.0.1:{self.port}"

    def start(self) -> "RedisServer":
        """Starts on its port; on another one where somebody took the first before it was ever ours."""
        for _ in range(NUM_TRIES if self._chosen else 0):
            try:
                self._start()
                self._chosen = False
                return self
            except PortTakenError:
                self.port = free_port()
        self._start()
        return self

    def _start(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        port = ("--port", "0", "--tls-port", str(self.port)) if self.is_tls else ("--port", str(self.port))
        command = [
            redis_binary(), *port, "--bind", "127.0.0.1", "--dir", str(self.directory), "--save", "",
            "--daemonize", "no", *self.arguments,
        ]  # fmt: skip
        log = self.directory / "redis.log"
        with log.open("ab") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            self._wait(log)
        except BaseException:
            self.kill()
            raise

    def _wait(self, log: Path) -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if self.process is None or self.process.poll() is not None:
                kind = PortTakenError if "Address already in use" in log.read_text() else RuntimeError
                raise kind(f"redis-server did not start:\n{log.read_text()}")
            try:
                with self.client() as client:
                    client.ping()
                return
            except redis.AuthenticationError:
                return  # it wants a password, so it is up
            except (redis.ConnectionError, redis.TimeoutError):
                pass
            time.sleep(0.02)
        raise RuntimeError(f"redis-server did not answer within 20 s:\n{log.read_text()}")

    def client(self) -> redis.Redis:
        """A plain client, for looking at and damaging what is there."""
        options = {"ssl": True, "ssl_cert_reqs": "none", "ssl_check_hostname": False} if self.is_tls else {}
        return redis.Redis(host="127.0.0.1", port=self.port, protocol=2, socket_timeout=10, retry=_NO_RETRY, **options)

    def kill(self) -> None:
        """kill -9, as a crash would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    stop = kill  # nothing here is worth a goodbye


def make_cluster(server: RedisServer) -> None:
    """Give a server started with --cluster-enabled yes all slots, and wait until it takes commands."""
    with server.client() as client:
        client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
        deadline = time.monotonic() + 20
        while client.cluster("INFO")["cluster_state"] != "ok":
            if time.monotonic() > deadline:
                raise RuntimeError("the one-node cluster did not come up within 20 s")
            time.sleep(0.02)
