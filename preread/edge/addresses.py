"""Addresses of gRPC targets: which are on this machine, and which proxy the environment puts in front of others."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Mapping
from urllib.parse import unquote

# Variables that gRPC reads, the first that is set. Other libraries read more; none of them connects to our own servers.
PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
_LOCAL_SCHEMES = ("unix:", "unix-abstract:")


def host_of(target: str) -> str:
    """The host of `host:port`, or of a gRPC target such as dns:///name:port or ipv6:[::1]:50051; no brackets."""
    rest = re.sub(r"^(dns:(//[^/]*/)?|ipv[46]:)", "", unquote(target.strip()))
    if rest.startswith("["):
        return rest[1:].partition("]")[0]
    return rest if rest.count(":") > 1 else rest.partition(":")[0]


def is_loopback(target: str) -> bool:
    """Whether a target is on this machine: loopback addresses in every notation, localhost, sockets in files."""
    if target.startswith(_LOCAL_SCHEMES):
        return True
    host = host_of(target).rstrip(".").lower()
    if host == "localhost" or host.endswith(".localhost") or host.startswith(("ip6-localhost", "ip6-loopback")):
        return True
    address = _address(host.partition("%")[0])
    return address is not None and (address.is_loopback or address.is_unspecified)


def listens_on_loopback(host: str) -> bool:
    """Whether an address to listen on is reached from this machine alone; 0.0.0.0, :: and "" are every interface."""
    address = _address(host.strip("[]").partition("%")[0])
    return bool(host) and is_loopback(host) and not (address is not None and address.is_unspecified)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        try:
            return ipaddress.IPv4Address(socket.inet_aton(host))  # 127.1, and whatever else the system resolves so
        except (OSError, UnicodeError):
            return None
    return (found.ipv4_mapped or found) if isinstance(found, ipaddress.IPv6Address) else found


def proxy_variable(target: str = "", environment: Mapping[str, str] | None = None) -> str:
    """Name of the variable whose proxy gRPC would reach a target through; "" where it would ask it directly.

    Args:
        target: "": any that is elsewhere and not named in no_proxy.
    """
    environment = os.environ if environment is None else environment
    name = next((name for name in PROXY_VARIABLES if environment.get(name)), "")
    return "" if target and (is_loopback(target) or _excepted(host_of(target), environment)) else name


def _excepted(host: str, environment: Mapping[str, str]) -> bool:
    """Whether no_proxy names a host: by the end of its name, or by a network it is in."""
    address = _address(host)
    for entry in (environment.get("no_grpc_proxy") or environment.get("no_proxy") or "").split(","):
        if not (wanted := entry.strip()):
            continue
        if host.lower().endswith(wanted.lower()):
            return True
        if "/" in wanted and address is not None:
            try:
                if address in ipaddress.ip_network(wanted, strict=False):
                    return True
            except ValueError:  # no network
                continue
    return False


def proxy_options(target: str) -> list[tuple[str, int]]:
    """Channel arguments: nothing on this machine is reached through a proxy, whatever the environment says."""
    return [("grpc.enable_http_proxy", 0)] if is_loopback(target) else []
