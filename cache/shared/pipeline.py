"""Many commands to Redis in few round trips, in chunks. Does not know keys or records."""

from collections.abc import Iterator, Sequence
from typing import Any

import redis

from cache.record import Record
from cache.shared.link import Client, Deadline, Link

Command = tuple[Any, ...]
# The first chunk of a read tells how large values are; enough to be worth its round trip, few enough to fit a budget.
_FIRST_CHUNK = 8


def run(link: Link, commands: Sequence[Command], max_chunk: int, *, chunk_bytes: int | None = None) -> list[Any]:
    """Results in order. A reply that is an error of reading one key stays in its place; others are raised.

    chunk_bytes: keep the replies of a chunk near this size, judged by those before it.
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
            pipeline = client.pipeline(transaction=False)
            for command in commands[len(results) : len(results) + chunk]:
                pipeline.execute_command(*command)
            replies = pipeline.execute(raise_on_error=False)
            received = sum(len(reply) for reply in replies if isinstance(reply, bytes))
            deadline.received(received)
            num_bytes += received
            results.extend(replies)
        for result in results:
            if isinstance(result, Exception) and not _is_wrong_type(result):
                raise result
        return results

    return link.call(work) if commands else []


def take_bytes(pairs: Iterator[tuple[bytes, Record]], num_bytes: int) -> list[tuple[bytes, Record]]:
    """The next pairs, until they are about `num_bytes`."""
    chunk = []
    for encoded_id, record in pairs:
        chunk.append((encoded_id, record))
        num_bytes -= record.size_bytes
        if num_bytes <= 0:
            break
    return chunk


def _is_wrong_type(result: Exception) -> bool:
    return isinstance(result, redis.ResponseError) and str(result).startswith("WRONGTYPE")
