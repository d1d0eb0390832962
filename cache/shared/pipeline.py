"""Many commands to Redis in few round trips, in chunks, with a proof that every reply is its command's own.

Does not know keys or records.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import redis

from cache.record import Record
from cache.shared.link import Client, Deadline, Link, Malformed

Command = tuple[Any, ...]  # name, key, arguments
IsValid = Callable[[object], bool]
# The first chunk of a read tells how large values are; enough to be worth its round trip, few enough to fit a budget.
_FIRST_CHUNK = 8


def run(
    link: Link,
    commands: Sequence[Command],
    is_valid: IsValid,
    max_chunk: int,
    *,
    chunk_bytes: int | None = None,
    budget_seconds: float | None = None,
) -> list[Any]:
    """Results in order. A reply that says that one key is of another type stays in its place; errors are raised.

    Args:
        is_valid: whether a reply, as redis-py gives it, can be one to these commands.
        chunk_bytes: keep the replies of a chunk near this size, judged by those before it.
        budget_seconds: None: the link's.
    """

    def work(client: Client, deadline: Deadline) -> list[Any]:
        results: list[Any] = []
        num_bytes = 0
        while len(results) < len(commands):
            deadline.check()
            chunk = max_chunk
            if chunk_bytes is not None:
                fitting = chunk_bytes * len(results) // max(num_bytes, 1) if results else _FIRST_CHUNK
                chunk = min(max(fitting, 1), max_chunk)
            replies = exchange(client, commands[len(results) : len(results) + chunk], is_valid)
            num_bytes += sum(len(reply) for reply in replies if isinstance(reply, bytes))
            results.extend(replies)
        return results

    return link.call(work, budget_seconds=budget_seconds) if commands else []


def exchange(client: Client, commands: Sequence[Command], is_valid: IsValid) -> list[Any]:
    """Replies to one round trip, in step with the commands.

    An ECHO of something new ends what is sent to each node: a reply too many or too few before it, a leftover of an
    earlier call too, puts another reply in its place. Otherwise a shifted nil would read as a missing passage.

    Raises:
        Malformed: they are not.
        redis.RedisError: an error reply.
    """
    pipeline = client.pipeline(transaction=False)
    for command in commands:
        pipeline.execute_command(*command)
    token = os.urandom(8).hex().encode()
    if hasattr(client, "get_node_from_key"):
        for node in {node.name: node for node in (client.get_node_from_key(key) for _, key, *_ in commands)}.values():
            pipeline.execute_command("ECHO", token, target_nodes=[node])
    else:
        pipeline.execute_command("ECHO", token)
    replies: list[Any] = pipeline.execute(raise_on_error=False)
    results, echoes = replies[: len(commands)], replies[len(commands) :]
    if not echoes or not all(_is_echo(reply, token) for reply in echoes):
        raise Malformed("the stream of replies is out of step")
    for reply in results:
        if isinstance(reply, Exception) and not is_wrong_type(reply):
            raise reply
    for reply in results:
        if not is_wrong_type(reply) and not is_valid(reply):
            raise Malformed(f"a reply of type {type(reply).__name__}")
    return results


def take_bytes(pairs: Iterator[tuple[bytes, Record]], num_bytes: int) -> list[tuple[bytes, Record]]:
    """The next pairs, until they are about `num_bytes`."""
    chunk = []
    for encoded_id, record in pairs:
        chunk.append((encoded_id, record))
        num_bytes -= record.size_bytes
        if num_bytes <= 0:
            break
    return chunk


def is_wrong_type(reply: object) -> bool:
    """Whether a key holds another type of value than the command is for."""
    return isinstance(reply, redis.ResponseError) and str(reply).startswith("WRONGTYPE")


def _is_echo(reply: object, token: bytes) -> bool:
    # A user or proxy without ECHO is told so in its place, which no other reply of ours looks like.
    if isinstance(reply, redis.ResponseError):
        return reply.status_code == "NOPERM" or "unknown command" in str(reply).lower()
    if isinstance(reply, Exception):
        raise reply
    return reply in (token, token.decode())
