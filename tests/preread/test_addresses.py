"""Laws of addresses: what is on this machine is reached without a proxy, in every notation."""

from __future__ import annotations

import pytest

from preread.channel import is_loopback, proxy_variable

HERE = [
    "127.0.0.1:50052", "localhost:1", "LOCALHOST:1", "localhost.:1", "a.localhost:1", "127.8.9.1:1", "127.1:1",
    "[::1]:1", "ipv4:127.0.0.1:1", "ipv6:[::1]:1", "ipv6:%5B::1%5D:1", "[::ffff:127.0.0.1]:1", "0.0.0.0:1", "[::]:1",
    "dns:///localhost:1", "dns:localhost:1", "dns://8.8.8.8/127.0.0.1:1", "unix:/run/preread.sock", "unix-abstract:x",
    "ip6-localhost:1",
]  # fmt: skip
ELSEWHERE = [
    "worker:50052", "10.0.0.1:1", "[2001:db8::1]:1", "dns:///worker.preread:1", "128.0.0.1:1", "localhost.example:1",
    "notlocalhost:1", "127.0.0.1.example:1", "ipv4:10.0.0.1:1", "[::ffff:10.0.0.1]:1", "[fe80::1%eth0]:1",
]  # fmt: skip


@pytest.mark.parametrize("target", HERE)
def test_here(target: str) -> None:
    assert is_loopback(target)
    assert proxy_variable(target, {"http_proxy": "http://proxy:1"}) == ""


@pytest.mark.parametrize("target", ELSEWHERE)
def test_elsewhere(target: str) -> None:
    assert not is_loopback(target)
    assert proxy_variable(target, {"http_proxy": "http://proxy:1"}) == "http_proxy"
    assert proxy_variable(target, {}) == ""


@pytest.mark.parametrize(
    ("target", "host"),
    [
        ("dns:///w.x:1", "w.x"),
        ("[2001:db8::1]:1", "2001:db8::1"),
        ("2001:db8::1", "2001:db8::1"),
        ("w:1", "w"),
        ("w", "w"),
    ],
)
def test_hosts(target: str, host: str) -> None:
    """A name in no_proxy is compared with the whole end of the target's host."""
    proxy = {"http_proxy": "http://proxy:1"}
    assert proxy_variable(target, {**proxy, "no_proxy": host}) == ""
    assert proxy_variable(target, {**proxy, "no_proxy": f"x{host}"}) == "http_proxy"


@pytest.mark.parametrize(
    ("target", "no_proxy", "name"),
    [
        ("worker.preread:1", "preread", ""),
        ("worker.preread:1", ".preread, other", ""),
        ("worker.preread:1", "WORKER.PREREAD", ""),
        ("worker.preread:1", "other,,", "grpc_proxy"),
        ("10.1.2.3:1", "10.0.0.0/8", ""),
        ("10.1.2.3:1", "10.2.0.0/16, no/network", "grpc_proxy"),
        ("[2001:db8::1]:1", "2001:db8::/32", ""),
    ],
)
def test_no_proxy(target: str, no_proxy: str, name: str) -> None:
    set_here = {"http_proxy": "http://b:1", "grpc_proxy": "http://a:1", "no_proxy": no_proxy}
    assert proxy_variable(target, set_here) == name
    assert proxy_variable(target, {"no_proxy": no_proxy}) == ""
