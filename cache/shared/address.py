"""Address: a Redis URL, taken apart and checked. Does not connect."""

import re
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote

from cache.errors import StoreUrlError
from cache.store import public_url

_HOST = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[^:\[\],/@\s]+)(?::(?P<port>\d{1,5}))?")
# As RFC 3986, appendix B, but for several hosts: urlsplit of some Pythons takes no bracket behind a comma.
_PARTS = re.compile(r"(?P<netloc>[^/?#]*)(?P<path>[^?#]*)(?:\?(?P<query>[^#]*))?(?P<fragment>#.*)?", re.DOTALL)
_PREFIX = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a Redis server or cluster is and how to greet it."""

    hosts: tuple[tuple[str, int], ...]
    is_tls: bool
    is_cluster: bool
    database: int
    username: str | None = field(repr=False)  # of some services the secret itself
    password: str | None = field(repr=False)
    prefix: str

    @classmethod
    def parse(cls, url: str) -> "Address":
        """Raises StoreUrlError; nothing that may be a part of the password is in the message."""
        scheme, _, rest = url.partition("://")
        shown = public_url(url, "***")
        kind, plus, cluster = scheme.partition("+")
        if kind not in ("redis", "rediss") or (plus and cluster != "cluster") or not rest:
            raise StoreUrlError(f"store: {shown!r}, expected redis://HOST, rediss://HOST or redis+cluster://HOST")
        parts = _PARTS.fullmatch(rest)
        assert parts is not None  # every string has these parts, some of them empty
        user, at, hosts = parts["netloc"].rpartition("@")
        if "@" in rest[parts.end("netloc") :]:
            raise StoreUrlError(f"store: {shown!r}, expected /, ? and # in user and password as %2F, %3F and %23")
        username, _, password = (unquote(part) for part in user.partition(":"))
        if not _is_text(username + password):
            raise StoreUrlError(f"store: {shown!r}, expected user and password as UTF-8")
        query = dict(parse_qsl(parts["query"] or "", keep_blank_values=True))
        prefix = query.pop("prefix", "preread")
        if query or parts["fragment"]:
            raise StoreUrlError(f"store: {shown!r}, expected no options besides ?prefix=; the password goes before @")
        if not _PREFIX.fullmatch(prefix):
            raise StoreUrlError(f"prefix: {shown!r}, expected 1 to 64 of letters, digits, '.', '_' and '-'")
        database = parts["path"].strip("/") or "0"
        if not database.isascii() or not database.isdigit() or (plus and database != "0"):
            raise StoreUrlError(f"store: database of {shown!r}, expected a number (0 in a cluster)")
        addresses = tuple(_host(host, shown) for host in hosts.split(","))
        if len(addresses) > 1 and not plus:
            raise StoreUrlError(f"store: {shown!r} names {len(addresses)} hosts; only redis+cluster:// may")
        return cls(
            hosts=addresses,
            is_tls=kind == "rediss",
            is_cluster=bool(plus),
            database=int(database),
            username=username or None if at else None,
            password=password or None if at else None,
            prefix=prefix,
        )

    def __str__(self) -> str:
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        return f"redis{'s' * self.is_tls}{'+cluster' * self.is_cluster}://{hosts}"


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _host(host: str, shown: str) -> tuple[str, int]:
    match = _HOST.fullmatch(host)
    port = int((match and match["port"]) or 6379)
    if match is None or not 0 < port < 65536:
        raise StoreUrlError(f"store: host of {shown!r}, expected HOST or HOST:PORT")
    return match["host"].strip("[]"), port
