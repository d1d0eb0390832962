"""EncoderService on grpc.aio: uploads into a collection, texts to states, what the store holds."""

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import ExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, TypeVar

import grpc
import numpy as np

from cache import DEFAULT_CODEC
from cache import errors as store_errors
from cache.collection import Collection
from cache.record import check_name, is_passage_id
from cache.store import Store, public_url
from encoder_worker.config import CollectionSettings, EncoderConfig, PipelineLimits
from encoder_worker.keeping import Keeper
from encoder_worker.passage_encoder import TOKENIZE_TEXTS, Encoded, EncodingFailed, PassageEncoder, Tokenized
from encoder_worker.pipeline import Pipeline
from encoder_worker.reading import Intake, ReadBatch
from encoder_worker.scheduler import EncodeScheduler
from encoder_worker.sources import Place, SourcePassage
from encoder_worker.writing import Target, Upsert, held
from preread import errors
from preread.v1 import common_pb2, encoder_pb2_grpc
from preread.v1 import encoder_pb2 as pb
from preread_edge.access import CALLER_CHARS, Scope, may, permits, require
from preread_edge.steps import Pauses, Step, stepped

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
MANY = 1000  # passages of one message, which are then checked in steps
BYTES_PER_VALUE = {pb.STATE_FORMAT_FLOAT32: 4, pb.STATE_FORMAT_BFLOAT16: 2}

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]


class EncoderService(encoder_pb2_grpc.EncoderServiceServicer):
    """The edge: UNAVAILABLE until the model, a `worker`, is there. `on_upserted` gets what an upload acknowledges."""

    def __init__(self, on_upserted: Callable[[pb.UpsertResponse], None]) -> None:
        self.worker: Worker | None = None
        self._on_upserted = on_upserted

    async def Upsert(  # type: ignore[override]  # noqa: N802  # the stubs know sync iterators only
        self, request_iterator: AsyncIterator[pb.UpsertRequest], context: Context
    ) -> None:
        """A response per message, in order, after the store has its passages."""
        async with self._call() as worker:
            requests = aiter(request_iterator)
            first = await anext(requests, None)
            if first is None:
                return
            if not first.collection:
                raise errors.InvalidRequest("collection", "", "the name of a collection in the first message")
            require(first.collection)
            if first.compression_ratio < 0:
                raise errors.InvalidRequest("compression_ratio", first.compression_ratio, "0 (the default) or more")
            lease = ExitStack()
            try:
                target = await worker.call(_open_or_make, worker, first, lease, store=True)
                await self._upsert(worker, target, first, requests, context)
            finally:
                await asyncio.shield(worker.call(lease.close, store=True))

    async def _upsert(
        self,
        worker: "Worker",
        target: Target,
        first: pb.UpsertRequest,
        requests: AsyncIterator[pb.UpsertRequest],
        context: Context,
    ) -> None:
        limits = PipelineLimits(
            max_unencoded=math.inf,
            max_unacknowledged=worker.config.max_unacknowledged_passages,
            max_unacknowledged_bytes=worker.config.max_unacknowledged_bytes,
            write_whole_batches=True,
            retry_seconds=(),
        )
        pipeline = Pipeline(worker.scheduler, target, worker.store_threads, limits)
        async with aclosing(pipeline.run(_batches(worker, target, first, requests))) as changes:
            async for finished in changes:
                for batch in finished:
                    response = await _pack_batch(batch)
                    self._on_upserted(response)
                    await context.write(response)

    async def Encode(self, request: pb.EncodeRequest, context: Context) -> pb.EncodeResponse:  # noqa: N802
        """Texts to pooled states, kept where `keep_in` says. A text that cannot be encoded costs itself only."""
        async with self._call() as worker:
            config, encoder = worker.config, worker.encoder
            _check_keep(request)
            if not 1 <= len(request.texts) <= config.max_texts:
                raise errors.InvalidRequest("texts", len(request.texts), f"1..{config.max_texts} texts")
            ratio = request.compression_ratio or encoder.settings.default_compression_ratio
            if ratio < 1:
                raise errors.InvalidRequest("compression_ratio", ratio, "0 (the default) or more")
            format = request.format or pb.STATE_FORMAT_FLOAT32
            if format not in BYTES_PER_VALUE:  # of a newer client
                raise errors.InvalidRequest("format", int(format), "STATE_FORMAT_FLOAT32 or STATE_FORMAT_BFLOAT16")
            refused = await worker.call(lambda: [encoder.why_not(one, config.max_text_bytes) for one in request.texts])
            good = [text for text, why in zip(request.texts, refused, strict=True) if why is None]
            tokenized: list[Tokenized] = []
            for start in range(0, len(good), TOKENIZE_TEXTS):  # in pieces: a cancelled call is noticed between them
                tokenize = partial(encoder.tokenize, split=request.split)
                tokenized += await worker.call(tokenize, good[start : start + TOKENIZE_TEXTS])
            # Before anything is computed:
            num_tokens = sum(text.num_tokens for text in tokenized)
            num_bytes = sum(text.num_states(ratio) for text in tokenized) * encoder.dim * BYTES_PER_VALUE[format]
            if num_bytes > config.max_answer_bytes:
                expected = f"fewer: their states are {num_bytes:,} bytes, at most {config.max_answer_bytes:,} are sent"
                raise errors.InvalidRequest("texts", len(tokenized), expected)
            in_flight = worker.scheduler.on_demand_tokens
            if in_flight and in_flight + num_tokens > config.max_queue_tokens:
                message = f"{in_flight:,} tokens are in flight; at most {config.max_queue_tokens:,} may be"
                raise errors.Overloaded(message, RETRY_SECONDS, reason="OVERLOADED")
            encoded = await worker.scheduler.encode(tokenized, ratio)
            if request.keep_in:
                encoded = await worker.keep(request.keep_in, request.caller, good, encoded)
            packed = iter(await worker.call(lambda: [_pack_encoded(one, format) for one in encoded]))
            return pb.EncodeResponse(
                passages=[next(packed) if why is None else pb.EncodedPassage(message=why) for why in refused],
                dim=encoder.dim,
                compression_ratio=ratio,
                format=format,
                fingerprint=encoder.identity.fingerprint,
            )

    async def Touch(self, request: pb.TouchRequest, context: Context) -> pb.TouchResponse:  # noqa: N802
        async with self._call(request.collection) as worker:
            for one in request.touched:
                await worker.call(worker.keeper.touch, request.collection, one.caller, one.passage_ids)
            return pb.TouchResponse()

    async def Delete(self, request: pb.DeleteRequest, context: Context) -> pb.DeleteResponse:  # noqa: N802
        async with self._call(request.collection) as worker:
            # An id that cannot exist is not there; an id that is named twice is deleted once.
            ids = [one for one in dict.fromkeys(request.passage_ids) if is_passage_id(one)]
            collection = await worker.call(Collection.open, worker.store, request.collection, store=True)
            return pb.DeleteResponse(num_deleted=await worker.call(collection.delete_many, ids, store=True))

    async def GetStats(self, request: pb.GetStatsRequest, context: Context) -> pb.GetStatsResponse:  # noqa: N802
        async with self._call(request.collection) as worker:
            collections = await worker.call(_collections, worker.store, request.collection, store=True)
            return pb.GetStatsResponse(collections=[one for one in collections if permits(one.name, *one.aliases)])

    async def Describe(self, request: pb.DescribeRequest, context: Context) -> pb.DescribeResponse:  # noqa: N802
        async with self._call() as worker:
            encoder = worker.encoder
            return pb.DescribeResponse(
                encoder=_pack_identity(encoder.identity),
                default_compression_ratio=encoder.settings.default_compression_ratio,
                default_codec=DEFAULT_CODEC,
                dtype=encoder.dtype_name,
                device=encoder.device_name,
                store=public_url(worker.config.store),
                max_message_bytes=worker.config.max_message_bytes,
            )

    @asynccontextmanager
    async def _call(self, collection: str = "") -> "AsyncIterator[Worker]":
        """Errors of the store become those of a call; preread_edge.grpc_server ends it with any PrereadError."""
        if self.worker is None:
            raise errors.Unavailable("this worker is loading its model, or stopping", retry_after_seconds=RETRY_SECONDS)
        if collection:
            require(collection)
        try:
            yield self.worker
        except store_errors.CacheError as exc:
            raise _of_store(exc, collection) from exc


@dataclass(frozen=True)
class Worker:
    """A loaded worker: what its calls share."""

    config: EncoderConfig
    encoder: PassageEncoder
    scheduler: EncodeScheduler
    store: Store
    threads: Executor  # for the tokenizer
    store_threads: Executor  # for the store alone: one that hangs must not keep texts from being encoded
    keeper: Keeper

    async def keep(self, name: str, caller: str, texts: list[str], encoded: list[Encoded]) -> list[Encoded]:
        """As Keeper.keep, for a key that may write there; for another one the states as they are."""
        if may(Scope.INDEX) and permits(name):
            return await self.keeper.keep(name, caller, texts, encoded)
        self.keeper.deny(name, len(encoded))
        return encoded

    async def call(self, function: Callable[..., T], *args: Any, store: bool = False) -> T:
        """Runs something that blocks off the event loop; `store`: on the store's threads."""
        threads = self.store_threads if store else self.threads
        return await asyncio.get_running_loop().run_in_executor(threads, function, *args)


async def _batches(
    worker: Worker, target: Target, first: pb.UpsertRequest, requests: AsyncIterator[pb.UpsertRequest]
) -> AsyncGenerator[ReadBatch, None]:
    """Messages off the event loop: checked one at a time, in order; several are tokenized side by side."""
    intake = Intake(worker.encoder, target, max_text_bytes=worker.config.max_text_bytes)
    numbers = count(1)

    def check(step: Step, request: pb.UpsertRequest) -> list[Upsert]:
        upserts = []
        for passage in request.passages:
            place = Place("upload", next(numbers))  # its number in the stream
            upserts.append(intake.check(SourcePassage(passage.passage_id, passage.text, place)))
            step()
        return upserts

    async def tokenize(todo: list[Upsert]) -> None:
        for start in range(0, len(todo), TOKENIZE_TEXTS):  # in pieces: a cancelled call is noticed between them
            await worker.call(intake.tokenize, todo[start : start + TOKENIZE_TEXTS])

    request: pb.UpsertRequest | None = first
    while request is not None:
        if request.collection not in ("", first.collection):
            expected = f"{first.collection!r}, as in the first message"
            raise errors.InvalidRequest("collection", request.collection, expected)
        many = len(request.passages) > MANY
        upserts = await (stepped(check, request) if many else worker.call(check, lambda: None, request))
        todo = await worker.call(intake.compare, upserts, store=True)
        yield ReadBatch(upserts, tokenizing=asyncio.ensure_future(tokenize(todo)))
        request = await anext(requests, None)


def _open_or_make(worker: Worker, first: pb.UpsertRequest, lease: ExitStack) -> Target:
    settings = CollectionSettings(first.compression_ratio or None, first.codec or None)
    make = partial(Target, worker.store, first.collection, settings, worker.encoder)
    target = lease.enter_context(held(make, shared=True))
    assert target is not None
    target.allow_clipped = worker.config.allow_clipped
    if target.num_training_states:
        raise errors.FailedPrecondition(
            "CODEC_NEEDS_TRAINING",
            first.collection,
            f"codec {target.codec.factory} is trained on a sample of the passages, which a stream does not "
            "give at once; make the collection with `preread index`, or take another codec",
        )
    if target.collection is None:
        target.stores_text = first.store_text
        target.create()
    return target


def _check_keep(request: pb.EncodeRequest) -> None:
    """Raises InvalidRequest."""
    if request.keep_in:
        try:
            check_name("keep_in", request.keep_in)
        except store_errors.InvalidName as exc:
            raise errors.InvalidRequest("keep_in", request.keep_in, "the name of a collection or alias") from exc
    if request.keep_in and request.split:
        raise errors.InvalidRequest("split", request.split, "false next to keep_in: kept texts are cut, never split")
    if len(request.caller) > CALLER_CHARS:
        expected = f"at most {CALLER_CHARS}"
        raise errors.InvalidRequest("caller", f"{len(request.caller)} characters long", expected)


async def _pack_batch(batch: ReadBatch) -> pb.UpsertResponse:
    results = []
    pace = Pauses()  # one message may hold tens of thousands of refused passages
    for one in batch.upserts:
        result = pb.UpsertResult(passage_id=one.passage.passage_id)
        if one.refused is not None:
            result.status, result.message = pb.UPSERT_STATUS_REFUSED, one.refused.message
        elif one.tokenized is None:
            result.status = pb.UPSERT_STATUS_UNCHANGED
        else:
            result.status = pb.UPSERT_STATUS_STORED
            result.num_tokens, result.num_states = one.tokenized.num_tokens, one.num_states
            result.truncated, result.num_clipped = one.tokenized.truncated, one.num_clipped
        results.append(result)
        await pace.worked()
    return pb.UpsertResponse(results=results)


def _pack_encoded(encoded: Encoded, format: pb.StateFormat) -> pb.EncodedPassage:
    """States (num_states, dim) float32 as little-endian rows; bfloat16 is rounded to nearest, ties to even."""
    if isinstance(encoded, EncodingFailed):
        return pb.EncodedPassage(message=str(encoded))
    if format == pb.STATE_FORMAT_BFLOAT16:
        bits = np.ascontiguousarray(encoded.states).view(np.uint32)
        rounded = bits + (0x7FFF + ((bits >> np.uint32(16)) & np.uint32(1)))
        data = (rounded >> np.uint32(16)).astype("<u2").tobytes()
    else:
        data = encoded.states.astype("<f4", copy=False).tobytes()
    return pb.EncodedPassage(states=data, window_tokens=encoded.window_tokens, truncated=encoded.truncated)


def _collections(store: Store, name: str) -> list[common_pb2.CollectionInfo]:
    names = [Collection.open(store, name).name] if name else store.list_collections()
    aliases = sorted(store.aliases().items())
    counts = ("num_passages", "num_states", "num_tokens", "num_truncated", "size_bytes", "num_clipped")
    infos = []
    for one in names:
        try:
            if (manifest := store.read_manifest(one)) is None:  # dropped a moment ago
                continue
            stats = store.stats(manifest.storage_name)
        except store_errors.StoreDamaged as exc:
            if name:
                raise
            log.warning("collection %r cannot be read: %s", one, exc)  # costs itself only
            continue
        info = common_pb2.CollectionInfo(
            name=manifest.collection,
            aliases=[alias for alias, target in aliases if target == one],
            encoder=_pack_identity(manifest),
            compression_ratio=manifest.compression_ratio,
            codec=manifest.codec,
            stores_text=manifest.stores_text,
            **{count: getattr(stats, count) for count in counts},
        )
        infos.append(info)
    if name and not infos:
        raise store_errors.CollectionNotFound(f"collection: {name!r} was dropped")
    return infos


def _pack_identity(of: object) -> common_pb2.EncoderIdentity:
    """Of an encoder's identity, or of a manifest, which has the same fields."""
    fields = ("fingerprint", "checkpoint", "dim", "max_passage_tokens", "passage_template", "pooling_version")
    return common_pb2.EncoderIdentity(**{name: getattr(of, name) for name in fields})


def _of_store(error: store_errors.CacheError, collection: str) -> errors.PrereadError:
    message = str(error)
    match error:
        case store_errors.InvalidName() | store_errors.CodecError():
            field = "collection" if isinstance(error, store_errors.InvalidName) else "codec"
            return errors.InvalidRequest.received(message, violations=(errors.FieldViolation(field, message),))
        case store_errors.CollectionNotFound():
            return errors.NotFound("collection", collection, message)
        case store_errors.StoreFull():
            return errors.Overloaded.received(message, reason="STORE_FULL", metadata=(("collection", collection),))
        case store_errors.StoreUnavailable() | store_errors.StoreLocked():
            return errors.Unavailable(message, retry_after_seconds=RETRY_SECONDS)
    # Else damaged, not ours to read, of an unknown version.
    reasons = {store_errors.EncoderMismatch: "ENCODER_MISMATCH", store_errors.CollectionExists: "COLLECTION_SETTINGS"}
    return errors.FailedPrecondition(reasons.get(type(error), "STORE_UNUSABLE"), collection, message)
