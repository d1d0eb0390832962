"""open_store: the store that a URL names; the one module that knows all of them."""

from cache.errors import StoreUrlError
from cache.store import Store, public_url


def open_store(
    url: str,
    *,
    read_budget_seconds: float = 0.1,
    write_budget_seconds: float = 30.0,
    ttl_seconds: int | None = None,
    tls_ca_file: str | None = None,
) -> Store:
    """Open a store by URL. Nothing is connected or created before it is used.

    memory:[NAME]          in this process, shared by everyone who opens the same name; gone when the last one closes it
    faiss:PATH             embedded, a directory, made on first write
    redis://[user:password@]HOST[:PORT][/DB]           shared; rediss:// for TLS
    redis+cluster://HOST[:PORT][,HOST[:PORT]...]       a Redis cluster; rediss+cluster:// for TLS

    Raises StoreUrlError when the URL cannot be understood. The other arguments are for Redis: the budgets of an online
    read, which received bytes extend by 10 ms a megabyte, and of each step of a write or scan; when passages expire;
    and an authority to trust.
    """
    scheme, separator, rest = url.partition(":")
    is_redis = separator and scheme in ("redis", "rediss", "redis+cluster", "rediss+cluster")
    if ttl_seconds is not None and not is_redis:
        why = f"has no meaning for {public_url(url)!r}, only Redis expires passages"
        raise StoreUrlError(f"ttl_seconds: {ttl_seconds} {why}")
    # A store's libraries are imported where they are used.
    if scheme == "memory" and separator:
        from cache.memory import MemoryStore

        return MemoryStore.shared(rest)
    if scheme == "faiss" and separator:
        from cache.faiss.store import FaissStore

        if not rest:
            raise StoreUrlError(f"store: {url!r} has no path, expected faiss:PATH")
        return FaissStore(rest)
    if is_redis:
        from cache.redis.store import RedisStore

        return RedisStore(url, read_budget_seconds, write_budget_seconds, ttl_seconds, tls_ca_file)
    shown = f"{public_url(url)!r}{'' if separator else ' has no scheme'}"
    raise StoreUrlError(f"store: {shown}, expected memory:, faiss:PATH, redis://, rediss:// or redis+cluster://")
