"""Encoding on demand: states of texts that come with a request, from an encoder worker, each text encoded once.

Everything a worker sends is checked before use.
"""

import asyncio
import logging
import struct
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import grpc
import numpy as np
from google.protobuf.message import Message

from cache.read_cache import ByteBoundedCache
from cache.states import PassageStates, text_digest
from checkpoint import EncoderIdentity
from preread.channel import ClientOptions
from preread.errors import Unavailable
from preread.v1 import encoder_pb2, encoder_pb2_grpc
from preread.values import REQUEST_ID
from preread.wire import unanswered
from preread_edge.logs import current

log = logging.getLogger(__name__)

MAX_ANSWER_BYTES = 1 << 30  # the largest answer is one batch of texts at ratio 1 in float32
DESCRIBE_TIMEOUT_SECONDS = 5.0
# Between two calls that tell a worker which kept passages were found, and the most that one tells.
TOUCH_SECONDS, MAX_TOUCHED = 1.0, 10_000


class Keep(NamedTuple):
    """Where the states of a request's texts are to be kept, and for whom."""

    collection: str  # as the server was told
    names: frozenset[str]  # all of the collection
    caller: str


class EncoderClient:
    """One encoder worker, over gRPC. Unavailable: it does not answer, rejects the call, or its answer is unusable."""

    def __init__(
        self, address: str, identity: EncoderIdentity, dtype_name: str, options: ClientOptions, api_key: str = ""
    ) -> None:
        """`identity` and `dtype_name` are those of the states that the decoder reads; no other encoder is accepted."""
        self.address = address
        self._identity = identity
        # States travel in the decoder's format: finer would be lost anyway.
        self._format: encoder_pb2.StateFormat = getattr(encoder_pb2, f"STATE_FORMAT_{dtype_name.upper()}")
        self._timeout_seconds = options.timeout_seconds
        self._api_key = api_key
        self._channel = options.channel(grpc.aio, address)
        self._stub = encoder_pb2_grpc.EncoderServiceStub(self._channel)

    async def encode(self, texts: Sequence[str], ratio: int, keep: Keep | None = None) -> list[PassageStates | str]:
        """Pooled states of each text, or why the worker refused that text; raises Unavailable.

        With `keep` they are the ones that are stored, to the bit.
        """
        format = self._format if keep is None else encoder_pb2.STATE_FORMAT_FLOAT32
        request = encoder_pb2.EncodeRequest(texts=texts, compression_ratio=ratio, format=format)
        if keep is not None:
            request.keep_in, request.caller = keep.collection, keep.caller
        answer = await self._call(self._stub.Encode, request, self._timeout_seconds)
        self._check_encoder(answer.fingerprint, answer.dim, Unavailable)
        if len(answer.passages) != len(texts) or answer.compression_ratio != ratio or answer.format != format:
            answered = f"{len(answer.passages)} passages at ratio {answer.compression_ratio} in format {answer.format}"
            raise self._error(f"answered {answered}; expected {len(texts)} at {ratio} in {format}")
        pairs = zip(answer.passages, texts, strict=True)
        return [self._unpack(passage, ratio, format, text, keep) for passage, text in pairs]

    async def touch(self, found: Mapping[tuple[str, str], Iterable[str]]) -> None:
        """Tells the worker which kept passages were found, by collection and caller; raises Unavailable."""
        for collection in dict.fromkeys(name for name, _ in found):
            own = ((caller, ids) for (name, caller), ids in found.items() if name == collection)
            touched = [encoder_pb2.Touched(caller=caller, passage_ids=ids) for caller, ids in own]
            request = encoder_pb2.TouchRequest(collection=collection, touched=touched)
            await self._call(self._stub.Touch, request, DESCRIBE_TIMEOUT_SECONDS)

    async def check(self) -> None:
        """Compares the worker's encoder with the decoder's: ValueError where it is another one; raises Unavailable."""
        answer = await self._call(self._stub.Describe, encoder_pb2.DescribeRequest(), DESCRIBE_TIMEOUT_SECONDS)
        self._check_encoder(answer.encoder.fingerprint, answer.encoder.dim, ValueError)

    async def close(self) -> None:
        await self._channel.close(None)

    async def _call(self, method: Callable[..., Awaitable[Any]], request: Message, seconds: float | None) -> Any:
        try:
            return await method(request, timeout=seconds, metadata=tuple(call_metadata(self._api_key).items()))
        except grpc.aio.AioRpcError as exc:
            code, details = exc.code(), exc.details()
            if code in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL):  # the text of a bug goes to the log alone
                log.error("the encoder worker failed: %s: %s", code.name, details)
                details = "its log has the cause"
            found = unanswered(exc)
            raise self._error(found.words if found else f"{code.name}: {details}") from exc

    def _check_encoder(self, fingerprint: str, dim: int, error: type[Exception]) -> None:
        read = self._identity
        if (fingerprint, dim) != (read.fingerprint, read.dim):
            message = f"encoder worker {self.address}: encodes with {fingerprint[:16]} (dim {dim}); the served model "
            raise error(f"{message}reads states of {read.fingerprint[:16]} (dim {read.dim})")

    def _unpack(
        self, passage: encoder_pb2.EncodedPassage, ratio: int, format: int, text: str, keep: Keep | None
    ) -> PassageStates | str:
        """Little-endian rows as float32 (num_states, dim)."""
        if passage.message:
            return passage.message
        try:
            if format == encoder_pb2.STATE_FORMAT_BFLOAT16:  # the upper half of a float32
                rows = (np.frombuffer(passage.states, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
            else:
                rows = np.frombuffer(passage.states, dtype="<f4").astype(np.float32)
            rows = rows.reshape(-1, self._identity.dim)
            if not np.isfinite(rows).all():
                return f"encoder worker {self.address}: states of this text are not finite"
            digest = text_digest(text)
            # Of one encoder: the one that this client checked.
            key = digest + struct.pack("<I", ratio) + (keep.collection.encode() if keep is not None else b"")
            return PassageStates(rows, tuple(passage.window_tokens), ratio, passage.truncated, digest, key)
        except ValueError as exc:  # no whole rows, or other counts; costs this text: the others' states are their own
            return str(self._error(f"answered states that do not fit: {exc}"))

    def _error(self, message: str) -> Unavailable:
        return Unavailable(f"encoder worker {self.address}: {message}")


def call_metadata(api_key: str) -> dict[str, str]:
    """Metadata of a call: the key, and the id and trace of the call that it serves."""
    metadata = {"authorization": f"Bearer {api_key}"} if api_key else {}
    if (call := current()) is not None:
        trace = {"traceparent": call.traceparent} if call.traceparent else {}
        metadata |= {REQUEST_ID: call.request_id} | trace
    return metadata


_Key = tuple[bytes, int, str]  # text digest, ratio the text is encoded at, collection whose codec has coded the states


class OnDemandStates:
    """States of the latest texts within a byte budget, with single flight. Only touched from the event loop."""

    def __init__(self, encoder: EncoderClient, *, max_bytes: int, base_ratio: int) -> None:
        self.num_encoded = 0
        self.num_hits = 0
        self._encoder = encoder
        # Texts are encoded at it for every multiple of it, and pooled, so that one encoding serves all.
        self._base_ratio = base_ratio
        # LRU rather than by frequency: a text comes again soon, or never.
        self._kept = ByteBoundedCache[_Key, PassageStates](max_bytes, lambda one: one.states.nbytes, policy="lru")
        self._flights: dict[_Key, asyncio.Future[PassageStates | str]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        # Kept passages, by collection and caller.
        self._found: defaultdict[tuple[str, str], set[str]] = defaultdict(set)

    @property
    def num_bytes(self) -> int:
        return self._kept.num_bytes

    def kept(self, digest: bytes, ratio: int, keep: Keep | None = None) -> PassageStates | None:
        """States at `ratio` that need no encoding, if there are any."""
        states = self._kept.get(self._key(digest, ratio, keep))
        self.num_hits += states is not None
        return states.at_ratio(ratio) if states is not None else None

    def found(self, keep: Keep, passage_ids: Iterable[str]) -> None:
        """Takes note of kept passages that were found in the store, for the worker, which evicts the others first."""
        own = self._found[keep.collection, keep.caller]
        is_first = not any(self._found.values())
        if sum(map(len, self._found.values())) < MAX_TOUCHED:
            own.update(passage_ids)
        if is_first and own:
            self._start(self._touch())

    async def encode(
        self, texts: Mapping[bytes, str], ratio: int, keep: Keep | None = None
    ) -> dict[bytes, PassageStates | str]:
        """States at `ratio` of texts by digest, or why there are none; waits for encodings in flight.

        With `keep` the worker also keeps them, and the states are those that are read from there later.
        A cancelled caller does not cancel the encoding: others may wait for it, and the next request probably will.
        """
        # Looked up again: since the caller looked, another request may have had them encoded.
        looked_up = {digest: self.kept(digest, ratio, keep) for digest in texts}
        kept: dict[bytes, PassageStates | str] = {key: own for key, own in looked_up.items() if own is not None}
        keys = {digest: self._key(digest, ratio, keep) for digest in texts if digest not in kept}
        if new := {key: texts[digest] for digest, key in keys.items() if key not in self._flights}:
            self._flights |= {key: asyncio.get_running_loop().create_future() for key in new}
            self._start(self._fly(new, keep))
        if flights := {digest: self._flights[key] for digest, key in keys.items()}:
            await asyncio.wait(flights.values())  # unlike await on each, leaves them be when the caller is cancelled
        for digest, flight in flights.items():
            result = flight.result()
            kept[digest] = result if isinstance(result, str) else result.at_ratio(ratio)
        return kept

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _key(self, digest: bytes, ratio: int, keep: Keep | None) -> _Key:
        coded_by = keep.collection if keep is not None else ""
        return digest, self._base_ratio if ratio % self._base_ratio == 0 else ratio, coded_by

    async def _touch(self) -> None:
        """Tells the worker in a moment; what it does not hear of is forgotten."""
        await asyncio.sleep(TOUCH_SECONDS)
        found, self._found = self._found, defaultdict(set)
        try:
            await self._encoder.touch(found)
        except Unavailable as exc:
            log.debug("%s", exc)

    async def _fly(self, new: dict[_Key, str], keep: Keep | None) -> None:
        (ratio,) = {ratio for _, ratio, _ in new}  # one call of encode, one ratio
        results: list[PassageStates | str] = ["encoding was cut off"] * len(new)
        try:
            results = await self._encoder.encode(list(new.values()), ratio, keep)
            self.num_encoded += len(new)
        except Unavailable as exc:
            results = [str(exc)] * len(new)
        except Exception:  # a bug: the callers must hear that there are no states, the log has why
            log.exception("%d texts could not be encoded", len(new))
            results = ["encoding failed; the server's log has the cause"] * len(new)
        finally:
            for key, result in zip(new, results, strict=True):
                self._flights.pop(key).set_result(result)
                if isinstance(result, PassageStates):
                    self._kept.put(key, result)
